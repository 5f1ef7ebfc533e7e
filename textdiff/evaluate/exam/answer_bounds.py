"""Log-likelihoods of answers: exact where that is cheap, else bounds under common random numbers.

An answer is scored conditional on its context, which is visible and never noisy. Sets of masked
tokens are enumerated where they are fewer than the draws would be: answers of one to seven tokens,
models in small blocks, and all autoregressive ones. Other answers draw noise. Those to one question
have it in common: the same levels, and the same uniform for the first token of each answer, for the
second, and so on. Between answers of different length the levels are the same shares of the answer.

A precision is planned by a pilot, whose noise is its own and which is in no number. All answers to
a question take the replicates of the one that needs most, so that they stay paired.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.evaluate.exam.answer_tokens import AnswerTokens
from textdiff.likelihood.estimators import build_estimator, default_estimator
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.stopping import LEAST_PILOT, MAX_REPLICATES, MIN_REPLICATES, PILOT
from textdiff.likelihood.text_scorer import TextScorer
from textdiff.likelihood.windows import Windows, cut_windows

SAMPLES = 8
"""Network rows per answer and replicate."""

EXACT, BEST = "exact", "balanced"


@dataclass(frozen=True)
class Effort:
    """Network rows that an answer may take.

    Attributes:
        mc: rows per answer; answers that take fewer to enumerate are exact.
        precision: standard error of every log-likelihood in nats, which decides instead of `mc`.
        seed: seed of the noise.
        batch_tokens: tokens per network call.
    """

    mc: int = 128
    precision: float | None = None
    seed: int = 0
    batch_tokens: int = 8192

    def __post_init__(self) -> None:
        least = SAMPLES * MIN_REPLICATES
        if self.mc < least:
            raise ConfigError(
                f"mc {self.mc}: give at least {least} draws, or no error can be stated",
                code="too_few_draws",
            )
        if self.precision is not None and not 0.0 < self.precision < math.inf:
            raise ConfigError(
                f"precision {self.precision}: give a standard error in nats above 0, such as 0.05",
                code="precision_out_of_range",
            )


@dataclass(frozen=True)
class AnswerDraws:
    """Log-likelihoods of one answer.

    Attributes:
        values: [R] float64, one per replicate.
        exact: whether it has no Monte-Carlo error.
    """

    values: Tensor
    exact: bool


def score_answers(
    scorer: TextScorer, answers: Sequence[AnswerTokens], effort: Effort
) -> list[AnswerDraws]:
    """Return the log-likelihood of every answer; equal ones are scored once.

    Raises:
        CheckpointError: the network's output is not finite.
    """
    unique = {answer.key: answer for answer in answers}
    by_size = defaultdict(list)
    for key, answer in unique.items():
        by_size[_enumerated(scorer, answer, effort)].append(key)
    draws: dict[object, AnswerDraws] = {}
    for size, keys in by_size.items():
        group = [unique[key] for key in keys]
        nats = _drawn(scorer, group, effort) if size is None else _exact(scorer, group, effort)
        draws |= dict(zip(keys, nats, strict=True))
    return [draws[answer.key] for answer in answers]


def _enumerated(scorer: TextScorer, answer: AnswerTokens, effort: Effort) -> int | None:
    """Return the most tokens of a block if the answer is to be enumerated; None: it is drawn."""
    size = scorer.family.block_size or scorer.context
    scored = np.arange(answer.start, len(answer.ids))
    most = int(np.bincount(scored // size).max())
    cheap = most <= effort.mc.bit_length() and 2**most - 1 <= effort.mc
    return most if cheap and _suits(EXACT, scorer, windows_of_answers(scorer, [answer])) else None


def _suits(estimator: str, scorer: TextScorer, windows: Windows) -> bool:
    """Return whether an estimator can score the model."""
    try:
        build_estimator(estimator).check(scorer.model, scorer.family, windows)
    except ConfigError:
        return False
    return True


def windows_of_answers(scorer: TextScorer, answers: Sequence[AnswerTokens]) -> Windows:
    """Return answers as documents whose noise is that of their question."""
    masks = [np.arange(len(answer.ids)) >= answer.start for answer in answers]
    allowed = scorer.family.process.vocabulary.clean.cpu().clone()  # [V]
    for answer in answers:
        allowed[answer.ids[: answer.start]] = True  # a chat template's control tokens are visible
    ids, texts = [answer.ids for answer in answers], [answer.text for answer in answers]
    windows = cut_windows(ids, texts, scorer.context, allowed, scored=masks)
    scored = windows.scored
    origin = None if scored is None else torch.tensor([int(each.argmax()) for each in scored])
    noise = torch.tensor([answer.question for answer in answers])  # [D]
    return replace(windows, noise=noise, origin=origin)


def _exact(
    scorer: TextScorer, answers: Sequence[AnswerTokens], effort: Effort
) -> list[AnswerDraws]:
    windows = windows_of_answers(scorer, answers)
    options = {"estimator": EXACT, "seed": effort.seed, "batch_tokens": effort.batch_tokens}
    nats = estimate(scorer.model, scorer.family, windows, **options).nats  # type: ignore[arg-type]
    return [AnswerDraws(-column, True) for column in nats.unbind(1)]


def _drawn(
    scorer: TextScorer, answers: Sequence[AnswerTokens], effort: Effort
) -> list[AnswerDraws]:
    """Return log-likelihoods from as many replicates as the effort allows."""
    if effort.precision is None:
        counts = dict.fromkeys(range(len(answers)), -(-effort.mc // SAMPLES))
    else:
        pilot = _replicates(scorer, answers, effort, LEAST_PILOT, PILOT)  # [P, D]
        counts = planned(pilot, [answer.question for answer in answers], effort.precision)
    draws: dict[int, AnswerDraws] = {}
    for count in sorted(set(counts.values())):
        which = [index for index, wanted in counts.items() if wanted == count]
        nats = _replicates(scorer, [answers[i] for i in which], effort, count)
        columns = [AnswerDraws(-column, False) for column in nats.unbind(1)]
        draws |= dict(zip(which, columns, strict=True))
    return [draws[index] for index in range(len(answers))]


def planned(pilot: Tensor, questions: Sequence[int], precision: float) -> dict[int, int]:
    """Return the replicates that each answer takes for its standard error, by its index.

    Counts are rounded up to powers of the square root of 2, so that few groups differ.

    Args:
        pilot: [P, D] nats of the pilot's replicates.
        questions: the question of each answer; its answers take the same number.
        precision: standard error in nats.
    """
    needed: dict[int, float] = defaultdict(lambda: float(MIN_REPLICATES))
    for question, deviation in zip(questions, pilot.std(0).tolist(), strict=True):
        needed[question] = max(needed[question], (deviation / precision) ** 2)
    rounded = {
        question: min(MAX_REPLICATES, math.ceil(2.0 ** (math.ceil(2.0 * math.log2(count)) / 2.0)))
        for question, count in needed.items()
    }
    return {index: rounded[question] for index, question in enumerate(questions)}


def _replicates(
    scorer: TextScorer, answers: Sequence[AnswerTokens], effort: Effort, count: int, first: int = 0
) -> Tensor:
    """Return the nats of `count` replicates of answers, [R, D]."""
    windows = windows_of_answers(scorer, answers)
    best = BEST if _suits(BEST, scorer, windows) else default_estimator(scorer.family)
    estimates = estimate(
        scorer.model,
        scorer.family,
        windows,
        estimator=best,
        seed=effort.seed,
        samples=SAMPLES,
        replicates=count,
        first=first,
        batch_tokens=effort.batch_tokens,
    )
    return estimates.nats[:count]
