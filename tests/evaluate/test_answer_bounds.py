"""Log-likelihoods of answers against enumeration, and noise that alternatives have in common."""

import itertools
import math

import pytest
import torch
from refusals import refused
from small_tokenizers import bpe, model_of

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.exam.answer_bounds import (
    Effort,
    planned,
    score_answers,
    windows_of_answers,
)
from textdiff.evaluate.exam.answer_tokens import AnswerEncoder, AnswerRequest, AnswerTokens
from textdiff.evaluate.exam.answered import Answer
from textdiff.likelihood.estimators import build_estimator
from textdiff.likelihood.replicates import ReplicateDraws
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.stopping import EstimateOptions

LONG = " rubbish"
"""An answer of eight tokens: 255 sets of masked ones, more than are enumerated by default."""


@pytest.fixture(scope="module")
def held():
    return model_of(bpe())


def tokens_of(held, *texts, question=0, context="a cat"):
    encoder = AnswerEncoder(held.tokenizer, held.family.process.vocabulary.clean)
    return encoder.answers([AnswerRequest("t", question, context, text) for text in texts])


def enumerated(held, answer: AnswerTokens) -> float:
    """-NELBO of an answer given its context: every set S of masked tokens weighs 1/(|S| C(n,|S|)),
    and the network is called here."""
    ids = torch.from_numpy(answer.ids).long()
    places = range(answer.start, len(ids))
    clean, total = held.family.process.vocabulary.clean, 0.0
    for size in range(1, len(places) + 1):
        for chosen in map(list, itertools.combinations(places, size)):
            row = ids.clone()
            row[chosen] = held.family.process.vocabulary.mask_token_id
            with torch.no_grad():
                logits = held.model(input_ids=row[None]).logits[0, chosen].float()
            log_p = logits.masked_fill(~clean, -math.inf).log_softmax(-1)
            nats = -float(log_p[range(size), ids[chosen]].sum())
            total += nats / (size * math.comb(len(places), size))
    return -total


def test_short_answers_are_enumerated(held):
    answers = tokens_of(held, " cat", " a b", " rub")
    for answer, draws in zip(answers, score_answers(held, answers, Effort()), strict=True):
        assert draws.exact
        assert float(draws.values) == pytest.approx(enumerated(held, answer), abs=1e-5)


def repeated(held, count: int):
    """Many questions with the same answer: each has noise of its own."""
    answers = [tokens_of(held, LONG, question=question)[0] for question in range(count)]
    (exact,) = score_answers(held, answers[:1], Effort(mc=255))
    drawn = score_answers(held, answers, Effort(mc=128))
    assert exact.exact
    assert not any(draws.exact for draws in drawn)
    return float(exact.values), [Answer(draws.values.numpy(), False) for draws in drawn]


def coverage(exact: float, answers) -> float:
    ends = [answer.interval() for answer in answers]
    return sum(low <= exact <= high for low, high in ends) / len(ends)


def test_drawn_answers_agree_with_enumeration_within_their_error(held):
    exact, answers = repeated(held, 100)
    assert exact == pytest.approx(enumerated(held, tokens_of(held, LONG)[0]), abs=1e-5)
    means = torch.tensor([answer[0] for answer in answers])
    assert abs(float(means.mean()) - exact) < 4 * float(means.std()) / len(means) ** 0.5
    stated = torch.tensor([answer.stderr for answer in answers]).square().mean().sqrt()
    assert float(means.std() / stated) == pytest.approx(1.0, abs=0.25)
    assert 0.88 < coverage(exact, answers) < 1.0


@pytest.mark.slow
def test_intervals_cover_the_exact_value_as_often_as_they_say(held):
    exact, answers = repeated(held, 1200)
    assert 0.93 < coverage(exact, answers) < 0.97


def test_blocks_of_one_token_are_exact(held):
    single = model_of(bpe(), block_size=1)
    (answer,) = tokens_of(single, " cat and a long rat")
    (draws,) = score_answers(single, [answer], Effort())
    assert draws.exact
    assert draws.values.shape == (1,)


def test_equal_alternatives_differ_by_nothing_and_questions_have_their_own_noise(held):
    first = tokens_of(held, LONG, LONG, " cabbages")
    (other,) = tokens_of(held, LONG, question=1)
    a, b, _, d = (x.values for x in score_answers(held, [*first, other], Effort()))
    assert torch.equal(a, b)
    assert not torch.equal(a, d)
    alone = score_answers(held, [first[0]], Effort())[0].values
    assert torch.allclose(alone, a, atol=1e-4)


def test_noise_counts_from_where_answers_begin(held):
    """One uniform for the j-th token of every answer, whatever its context and its length."""
    answers = [
        *tokens_of(held, LONG, context="a"),
        *tokens_of(held, " rubbish and", context="a cat in a"),
        *tokens_of(held, " rub", context=""),
    ]
    windows = windows_of_answers(held, answers)
    scorer = Scorer(held.model, held.family, 8192)
    estimator = build_estimator("masked_count")
    draws = ReplicateDraws(scorer, windows, estimator, 0, EstimateOptions())
    (batch,) = draws.batches_of(0)
    orders = batch.orders(0, 2)
    rows = {int(w): orders[row] for row, w in enumerate(batch.window)}
    starts = [answer.start for answer in answers]
    assert len(set(starts)) == 3
    for number, length in ((1, 8), (2, 4)):
        ours = rows[number][starts[number] : starts[number] + length]
        assert torch.equal(ours, rows[0][starts[0] : starts[0] + length])
    assert torch.equal(batch.v, batch.v[:1].expand_as(batch.v))


def test_precision_is_reached_with_as_many_replicates_for_all_alternatives(held):
    answers = tokens_of(held, LONG, " cabbages and")
    draws = score_answers(held, answers, Effort(precision=0.04))
    counts = {len(each.values) for each in draws}
    assert len(counts) == 1
    assert counts.pop() > 16
    assert all(Answer(each.values.numpy(), False).stderr < 0.052 for each in draws)


def test_replicates_follow_the_alternative_that_needs_most():
    pilot = torch.tensor([[0.0, 0.0, 0.0], [1.0, 8.0, 0.5]], dtype=torch.float64)
    counts = planned(pilot, [5, 5, 6], precision=0.25)
    needed = 8.0**2 / 2 / 0.25**2
    assert counts[0] == counts[1]
    assert needed <= counts[0] < needed * 2**0.5 + 1
    assert counts[2] == 8  # 2 would do; no error is stated of fewer than 8


def test_long_contexts_lose_their_beginning(held):
    (answer,) = tokens_of(held, " cat", context="a cat sat " * 5)
    short = answer.within(held.context)
    assert short.truncated
    assert len(short.ids) == held.context == 24
    assert short.ids.tolist() == answer.ids[-24:].tolist()
    assert len(short.ids) - short.start == len(answer.ids) - answer.start
    assert not tokens_of(held, " cat")[0].within(held.context).truncated


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"mc": 63}, "too_few_draws"),
        ({"precision": 0.0}, "precision_out_of_range"),
        ({"precision": math.nan}, "precision_out_of_range"),
    ],
)
def test_efforts_out_of_range(options, code):
    with refused(ConfigError, code):
        Effort(**options)


def test_answers_without_tokens_are_not_scored_as_certain(held):
    with refused(DataError, "answer_without_tokens", "t:"):
        tokens_of(held, "")
    with refused(DataError, "answer_without_tokens", "t:"):
        tokens_of(held, "at", context="c")  # one token, `cat`
