"""Choices among alternatives, and checks of written answers."""

import math
import pickle

import numpy as np
import pytest

from textdiff.evaluate.exam.answered import Answer, WholeText, WrittenAnswer
from textdiff.evaluate.exam.decisions import Certainty, Decision, decide, wilson
from textdiff.evaluate.exam.tasks.checkers import (
    is_solution,
    last_number,
    reaches,
    same_answer,
)


def test_leads_are_measured_with_the_noise_that_alternatives_share():
    shared = np.array([3.0, -1.0, 2.0, -4.0])
    near = [Answer(-10.0 + shared, False), Answer(-10.5 + shared, False)]
    decision = decide(near, right=0)
    assert decision.lead == pytest.approx(0.5)
    assert decision.stderr == pytest.approx(0.0, abs=1e-12)
    assert not decision.undecided
    assert decision.chance == 1.0
    apart = [Answer(-10.0 + shared, False), Answer(-10.5 - shared, False)]
    decision = decide(apart, right=0)
    assert decision.stderr == pytest.approx((2 * shared).std(ddof=1) / 2)
    assert decision.undecided


def test_ties_are_undecided():
    exact = [
        Answer(np.array([-2.0]), False, exact=True),
        Answer(np.array([-2.0]), False, exact=True),
    ]
    assert decide(exact, right=0).undecided
    assert decide(exact, right=0).right
    clear = [
        Answer(np.array([-2.0]), False, exact=True),
        Answer(np.array([-3.0]), False, exact=True),
    ]
    assert not decide(clear, right=1).undecided
    assert decide(clear, right=1).chance == 0.0


def test_chance_is_that_of_the_normal_distribution():
    away = np.array([1.0, -1.0, 1.0, -1.0])
    stderr = away.std(ddof=1) / 2
    pair = [Answer(-5.0 + away, False), Answer(np.array([-5.5]), False, exact=True)]
    chances = [decide(pair, 0, seed).chance for seed in range(40)]
    expected = 0.5 * (1.0 + math.erf(0.5 / stderr / math.sqrt(2.0)))
    assert np.mean(chances) == pytest.approx(expected, abs=0.015)


def test_intervals_of_an_accuracy_include_both_errors():
    sure = [Decision(9.0, 0.1, index % 4 > 0, float(index % 4 > 0)) for index in range(80)]
    plain = Certainty.of(sure)
    assert (plain.questions, plain.undecided, plain.accuracy) == (80, 0, 0.75)
    assert (plain.low, plain.high) == pytest.approx(wilson(0.75, 80))
    doubtful = [Decision(0.1, 1.0, d.right, 0.55 if d.right else 0.45) for d in sure]
    wide = Certainty.of(doubtful)
    assert wide.undecided == 80
    assert wide.low < plain.low - 0.05
    assert wide.high > plain.high
    perfect = Certainty.of([Decision(9.0, 0.1, True, 1.0)] * 10)
    assert 0.6 < perfect.low < 0.9
    assert perfect.high == 1.0


def test_answers_are_plain_values_that_keep_their_draws_when_pickled():
    answer = pickle.loads(pickle.dumps(Answer(np.array([-1.0, -2.0]), True, truncated=True)))
    log_likelihood, greedy = answer
    assert (log_likelihood, greedy) == (-1.5, True)
    assert answer.stderr == pytest.approx(0.5)
    assert answer.truncated
    text = pickle.loads(pickle.dumps(WrittenAnswer("a", truncated=True)))
    assert text == "a"
    assert text.truncated
    whole = pickle.loads(pickle.dumps(WholeText(np.array([-3.0]), exact=True)))
    assert whole == -3.0
    assert whole.stderr == 0.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("44-15=29,79-29=50", True),
        (" 44 - 15 = 29, 79 - 29 = 50\nand more", True),
        ("79-44=35,35+15=50", True),
        ("44-15=28,79-29=50", False),  # wrong arithmetic
        ("44-15=29,79-29=51", False),
        ("44-15=29,29+21=50", False),  # 21 was not given
        ("35+15=50", False),  # 35 neither
        ("44-15=29", False),  # misses the target
        ("79-29=50", False),
        ("50=50", False),
        ("", False),
    ],
)
def test_countdown_checker(text, right):
    assert reaches(text, [15, 44, 79], 50) is right


def test_countdown_uses_every_number_once_and_divides_without_rest():
    assert reaches("6/3=2", [6, 3], 2)
    assert not reaches("7/3=2", [7, 3], 2)
    assert not reaches("6/0=0", [6, 0], 0)
    assert not reaches("3+3=6", [3, 4], 6)
    assert not reaches("3+4=7", [3, 4, 5], 7)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\n1423\n2341\n3214\n4132\n\n", True),
        ("1423\n2341\n3214\n4123", False),  # changes a given digit, too
        ("1423\n2314\n3241\n4132", False),  # rows and boxes repeat nothing, a given is changed
        ("1423\n3241\n2314\n4132", False),
        ("1423\n2341\n3214", False),
        ("14234\n2341\n3214\n4132", False),
    ],
)
def test_sudoku_checker(text, right):
    assert is_solution(text, "1003\n0300\n3210\n4132") is right


def test_sudoku_boxes_are_checked():
    assert not is_solution("1234\n2341\n3412\n4123", "0000\n" * 4)


def test_last_numbers():
    assert last_number("so 1,234.50 is 12") == 12
    assert last_number("#### 1,234") == 1234
    assert last_number("none") is None
    assert same_answer({"answer": "x = 7"}, ["it is 7"]) == {"exact_match": 0.0, "acc": 1.0}
    assert same_answer({"answer": "yes"}, [" yes\n"]) == {"exact_match": 1.0, "acc": 1.0}
    assert same_answer({"answer": "7"}, ["nothing"]) == {"exact_match": 0.0, "acc": 0.0}
