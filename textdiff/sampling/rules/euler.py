"""Euler: tau-leaping along the reverse rates, which are held constant over each step.

Position by position, x_s = y with probability [y = x_t] + (t - s) sigma'(t) Q(x_t, y) s(y)
(Sec. 4.1, arXiv:2310.16834); what big steps make negative counts as 0. Tweedie's step is as dear
and exact where the score is; this is the baseline that score models were published with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.rules.knobs import check_switch
from textdiff.sampling.rules.redrawing import Interval
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.scores import Move, bounded, follow_scores, tweedie_move
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Euler(Rule):
    """Follows the reverse rates down an even grid of times, in at most `steps` calls.

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
        move = _move(segment.process, segment.schedule)
        yield from follow_scores(segment, _noise, move, self.greedy_tail)


def _noise(schedule: NoiseSchedule, interval: Interval) -> Tensor:
    """(t - s) sigma'(t)."""
    return -schedule.dalpha(interval.t) / interval.alpha_t / interval.steps


def _move(process: ForwardProcess, schedule: NoiseSchedule) -> Move:
    """Jumps to each token at its rate, which under uniform noise is its score over K."""
    exact = tweedie_move(process)

    def move(log_score: Tensor, before: Tensor, interval: Interval) -> Tensor:
        if interval.last:
            return exact(log_score, before, interval)
        clean, noise = process.vocabulary.clean, _noise(schedule, interval).to(before.device)
        log_score, excess = bounded(log_score, noise.log())
        jump = log_score.exp().where(clean, 0.0) / process.vocabulary.count
        jump = noise * jump
        jump = jump.scatter(-1, before[:, None], 0.0)
        return jump.scatter(-1, before[:, None], (-excess).exp() - jump.sum(-1, keepdim=True))

    return move
