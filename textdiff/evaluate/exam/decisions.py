"""Certainty of a choice among alternatives whose log-likelihoods have a Monte-Carlo error.

A question is undecided where the best alternative leads the second by less than two standard errors
of their difference. That error comes from replicates that both have in common. A tie is undecided.

The interval of an accuracy has two parts. Choices drawn again under the Monte-Carlo error,

    z_k = mean_k + sum_r e_r (draw_rk - mean_k) / sqrt(R (R - 1)), e_r standard normal,

have the covariance of the means. Their share of right choices says how far the accuracy is off in
either direction: noise draws it towards chance. The rest is the error over questions as a sample.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.evaluate.exam.answered import Answer

STANDARD_ERRORS = 2.0
REDRAWS = 256
QUANTILE = 1.96
"""Of the standard normal distribution, for intervals of 95 %."""


@dataclass(frozen=True)
class Decision:
    """The choice at one question.

    Attributes:
        lead: log-likelihood of the best alternative minus that of the second.
        stderr: Monte-Carlo standard error of the lead.
        right: whether the best is the right one.
        chance: probability that the right one is best, under the Monte-Carlo error.
    """

    lead: float
    stderr: float
    right: bool
    chance: float

    @property
    def undecided(self) -> bool:
        """True where the lead is less than two standard errors, or nothing."""
        return self.lead <= 0.0 or self.lead < STANDARD_ERRORS * self.stderr


def decide(answers: Sequence[Answer], right: int, seed: int = 0) -> Decision:
    """Return the choice among alternatives.

    Args:
        answers: at least two, with replicates in common.
        right: index of the right one.
        seed: seed of the choices drawn again.
    """
    means = np.array([answer[0] for answer in answers])
    first, second = np.argsort(-means, kind="stable")[:2]
    away = _deviations(answers)  # [R, K]
    lead = float(means[first] - means[second])
    count = len(away)
    spread = (away[:, first] - away[:, second]).std(ddof=1) if count > 1 else 0.0
    if count == 1:
        chance = float(first == right)
    else:
        e = np.random.default_rng(seed).standard_normal((REDRAWS, count))
        z = means + e @ away / math.sqrt(count * (count - 1))  # [REDRAWS, K]
        chance = float((z.argmax(1) == right).mean())
    return Decision(lead, float(spread) / math.sqrt(count), bool(first == right), chance)


def _deviations(answers: Sequence[Answer]) -> NDArray[np.float64]:
    """Return deviations from the means, [R, K], in the replicates that all have; 0 if exact."""
    count = min((len(answer.draws) for answer in answers if not answer.exact), default=1)
    columns = [
        np.zeros(count) if answer.exact else answer.draws[:count] - answer.draws[:count].mean()
        for answer in answers
    ]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Certainty:
    """Certainty of an accuracy.

    Attributes:
        questions: number of questions with alternatives.
        undecided: how many of them are undecided.
        accuracy: share of right choices.
        low: lower end of its 95 % interval, over questions and with the Monte-Carlo error.
        high: upper end.
    """

    questions: int
    undecided: int
    accuracy: float
    low: float
    high: float

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> "Certainty":
        """Return the certainty of the accuracy over questions, of which there is at least one."""
        count = len(decisions)
        chances = np.array([decision.chance for decision in decisions])
        accuracy = sum(decision.right for decision in decisions) / count
        expected = float(chances.mean())
        within = QUANTILE**2 * float((chances * (1.0 - chances)).sum()) / count**2
        least, most = min(accuracy, expected), max(accuracy, expected)
        return cls(
            count,
            sum(decision.undecided for decision in decisions),
            accuracy,
            max(0.0, least - math.hypot(least - wilson(least, count)[0], math.sqrt(within))),
            min(1.0, most + math.hypot(wilson(most, count)[1] - most, math.sqrt(within))),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "questions": self.questions,
            "undecided": self.undecided,
            "acc": self.accuracy,
            "acc_interval_95": [self.low, self.high],
        }


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval (1927) of a share of `count` questions."""
    square = QUANTILE**2 / count
    middle = (share + square / 2.0) / (1.0 + square)
    reach = math.sqrt(share * (1.0 - share) * square + square**2 / 4.0) / (1.0 + square)
    return middle - reach, middle + reach


def decisions_of(samples: Sequence[Mapping[str, Any]]) -> list[Decision]:
    """Return the choices at the questions of a task, those of lm-evaluation-harness's `acc`.

    Questions without alternatives, or with a right one that is not a number, are left out.

    Args:
        samples: the harness's samples.
    """
    decisions = []
    for sample in samples:
        answers = [response[0] for response in sample["resps"]]
        if "acc_mutual_info" in sample:  # the second half is without context
            answers = answers[: len(answers) // 2]
        right = sample["target"]
        alternatives = len(answers) > 1 and all(isinstance(a, Answer) for a in answers)
        if alternatives and "acc" in sample and isinstance(right, int):
            decisions.append(decide(answers, right, seed=sample["doc_id"]))
    return decisions
