"""Metrics against values worked out by hand, and intervals against the law they are for."""

import math

import numpy as np
import pytest

from textdiff.errors import DataError
from textdiff.evaluate.figures import Figure, figure_of, resample
from textdiff.evaluate.judges import Judgement
from textdiff.evaluate.suites import TextSet
from textdiff.evaluate.text_metrics import (
    METRICS,
    NGrams,
    Subject,
    length_quantiles,
    longest_repeat,
    measure,
)

ROWS = [[1, 1, 2, 2], [1, 2, 1, 2, 1], [3], []]
TEXTS = TextSet(["aabb", "ababa", "é", ""], ROWS, [True, False, True, True])
JUDGED = Judgement(
    np.array([4.0, 6.0, 2.0, 0.0]), np.array([2.0, 3.0, 1.0, 0.0]), np.array([4.0, 5.0, 2.0, 0]), 0
)


def values(texts=TEXTS, judgement=JUDGED):
    found = measure(Subject(texts, judgement), resample(len(texts), 200, 0))
    assert set(found) == set(METRICS)
    return {name: figure.value for name, figure in found.items()}


def test_figures_by_hand():
    found = values()
    assert found["gen_ppl"] == pytest.approx(math.exp(12 / 6))
    assert found["judge_bits_per_byte"] == pytest.approx(12 / math.log(2) / 11)
    two = -(2 / 5 * math.log(2 / 5) + 3 / 5 * math.log(3 / 5))
    assert found["entropy"] == pytest.approx((math.log(2) + two + 0) / 3)  # the empty one has none
    pooled = -sum(p * math.log(p) for p in (5 / 10, 4 / 10, 1 / 10))
    assert found["entropy_pooled"] == pytest.approx(pooled)
    assert found["distinct_1"] == pytest.approx(3 / 10)
    assert found["distinct_2"] == pytest.approx(4 / 7)  # 11 12 22 | 12 21 12 21
    assert found["distinct_3"] == pytest.approx(4 / 5)  # 112 122 | 121 212 121
    assert found["rep_1"] == pytest.approx((2 / 4 + 3 / 5 + 0) / 3)
    assert found["rep_2"] == pytest.approx((0 + 2 / 4) / 2)
    assert found["longest_repeat"] == pytest.approx((1 + 3 + 0) / 3)
    assert found["tokens"] == pytest.approx(10 / 4)
    assert found["bytes"] == pytest.approx(11 / 4)
    assert found["ended"] == pytest.approx(3 / 4)


def test_what_is_not_known_is_not_a_number():
    found = values(TextSet(TEXTS.texts, ROWS), None)
    for name in ("gen_ppl", "judge_bits_per_byte", "ended"):
        assert math.isnan(found[name])
    short = values(TextSet(["a", "b"], [[1], [2]]), None)
    assert math.isnan(short["distinct_2"])
    assert Figure(math.nan, math.nan, math.nan).to_dict()["value"] is None


def test_no_text_at_all_is_refused():
    with pytest.raises(DataError) as error:
        TextSet(["", ""], [[], []])
    assert error.value.code == "all_texts_empty"


@pytest.mark.parametrize(
    ("ids", "longest"),
    [([], 0), ([5], 0), ([5, 5], 1), ([5, 5, 5, 5], 3), ([1, 2, 3, 1, 2, 4], 2), ([1, 2, 3], 0)],
)
def test_longest_repeat(ids, longest):
    assert longest_repeat(ids) == longest


def test_ngrams_count_as_a_dictionary_does():
    rng = np.random.default_rng(0)
    rows = [rng.integers(5, size=n).tolist() for n in (30, 0, 2, 17, 40)]
    weights = rng.integers(3, size=(6, 5)).astype(float)
    for n in (1, 2, 3):
        grams = NGrams.of(rows, n)
        (found,) = grams.frequencies(weights)
        for often, counted in zip(weights, found, strict=True):
            known: dict[tuple[int, ...], float] = {}
            for ids, weight in zip(rows, often, strict=True):
                for at in range(len(ids) - n + 1):
                    key = tuple(ids[at : at + n])
                    known[key] = known.get(key, 0.0) + weight
            assert sorted(counted) == sorted(known.values())


def test_lengths_are_quantiles():
    found = length_quantiles(TEXTS)
    assert found["tokens"]["least"] == 0
    assert found["tokens"]["median"] == 2.5
    assert found["bytes"]["most"] == 5


@pytest.mark.parametrize("texts", [40, 41])
def test_intervals_hold_what_they_say(texts):
    """Of 400 sets of texts, 95 % have intervals that hold the mean of their law."""
    rng = np.random.default_rng(1)
    weights = resample(texts, 400, 0)
    held = 0
    for _ in range(400):
        lengths = rng.integers(1, 10, size=texts).astype(float)
        nats = rng.exponential(2.0, size=texts) * lengths
        found = figure_of(lambda w, n=nats, k=lengths: (w @ n) / (w @ k), weights)
        held += found.low <= 2.0 <= found.high
    assert 0.90 < held / 400 < 0.975


@pytest.mark.parametrize(
    ("name", "least", "most"), [("entropy_pooled", 0.8, 1.25), ("distinct_2", 1.0, 1.8)]
)
def test_intervals_of_pooled_figures_have_the_spread_of_new_texts(name, least, most):
    """Figures of 150 sets vary as much as one set's interval says; of distinct things, less."""
    rng = np.random.default_rng(2)
    weights = resample(48, 200, 0)
    values, widths = [], []
    for index in range(150):
        rows = rng.geometric(0.2, size=(48, 30)).tolist()
        statistic = METRICS[name].statistic(Subject(TextSet(["x"] * 48, rows)))
        found = figure_of(statistic, weights if index < 15 else weights[:2])
        values.append(found.value)
        widths += [found.high - found.low] if index < 15 else []
    assert least < np.mean(widths) / (2 * 1.96 * np.std(values)) < most


def test_one_seed_one_interval():
    assert (resample(10, 50, 3) == resample(10, 50, 3)).all()
    assert (resample(10, 50, 3) != resample(10, 50, 4)).any()
    assert set(resample(9, 50, 0).sum(1)) == {4}
