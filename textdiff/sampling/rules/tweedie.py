"""Tweedie: the law of x_s that a score implies if it is right, position by position.

Thm. 4.2, arXiv:2310.16834 (`analytic` in its code). Under absorbing noise a mask is revealed
with probability (alpha_s / alpha_t - 1) times the sum of its scores, and becomes y in proportion to
its score of y; these are two draws, so no race in float32 cuts off the tail.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.rules.knobs import check_switch
from textdiff.sampling.rules.redrawing import Interval
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.scores import follow_scores, tweedie_move
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Tweedie(Rule):
    """Follows the score down an even grid of times, in at most `steps` calls.

    Attributes:
        greedy_tail: take the likeliest tokens at the last step.
    """

    greedy_tail: bool = False

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "uniform")
    otherwise: ClassVar[str] = "walks along scores of absorbing or uniform noise"
    needs_score: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_switch("greedy_tail", self.greedy_tail)

    def __call__(self, segment: Segment) -> Iterator[Step]:
        move = tweedie_move(segment.process)
        yield from follow_scores(segment, _rise, move, self.greedy_tail)


def _rise(schedule: NoiseSchedule, interval: Interval) -> Tensor:
    """exp(sigma_t - sigma_s) - 1."""
    return interval.alpha_s / interval.alpha_t - 1.0
