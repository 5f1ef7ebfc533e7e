"""What the rules share that walk along scores, the ratios q(y) / q(x_t).

Where nothing of the text survives (alpha = 0) scores say nothing about time: they are all 0 under
absorbing noise and all 1 under uniform noise. From there the first step is drawn from the posterior
of the clean tokens that the score implies; the last is Tweedie's to no noise, the mask left out
(the denoising step of App. C.2, arXiv:2310.16834). Letters: N open positions, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.rules.redrawing import Interval, Law, ancestral_law, redraw
from textdiff.sampling.rules.revealing import Chance, reveal_by_chance
from textdiff.sampling.segment import Segment, Step

Rise = Callable[[NoiseSchedule, Interval], Tensor]
"""rise(schedule, interval) -> scalar; times a mask's summed scores, its chance to be revealed."""

Move = Callable[[Tensor, Tensor, Interval], Tensor]
"""move(log_score [N, V], tokens [N], interval) -> [N, V] weights, of which negative ones are 0."""


LARGEST_EXPONENT = 600.0
"""Sums of exponentials up to this one do not overflow float64, whatever the vocabulary."""


def follow_scores(segment: Segment, rise: Rise, move: Move, greedy_tail: bool) -> Iterator[Step]:
    """Fill the open positions in at most `steps` calls, by a score rule's single step."""
    if segment.process.replaces_tokens:
        yield from redraw(segment, _law(segment.process, move), greedy_tail)
        return
    yield from reveal_by_chance(segment, _chance(segment.schedule, rise), greedy_tail)


def _chance(schedule: NoiseSchedule, rise: Rise) -> Chance:
    def chance(prediction: Prediction, interval: Interval) -> Tensor:
        score = prediction.log_score
        assert score is not None
        if interval.alpha_t == 0.0:
            return interval.alpha_s.expand(len(score))
        total = score.logsumexp(-1).double().cpu().exp()
        return rise(schedule, interval) * total.clamp(max=torch.finfo(torch.float64).max)

    return chance


def _law(process: ForwardProcess, move: Move) -> Law:
    posterior = ancestral_law(process)

    def law(prediction: Prediction, before: Tensor, interval: Interval) -> Tensor:
        if interval.alpha_t == 0.0:
            return posterior(prediction, before, interval)
        log_score = prediction.log_score
        if log_score is None:  # controls have changed what it would be the score of
            alpha = interval.alpha_t.to(before.device).expand(len(before))
            log_score = process.log_score(prediction.log_x0, before, alpha)
        weights = move(log_score, before, interval).clamp(min=0.0)
        lost = weights.sum(-1, keepdim=True) == 0.0  # to rounding, where next to nothing survives
        if bool(lost.any()):
            weights = torch.where(lost, posterior(prediction, before, interval), weights)
        return weights

    return law


def bounded(log_score: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """[N, V] float64 log-scores whose exponentials do not overflow, and [N, 1] what was subtracted.

    It is 0 but for scores near overflowing: weights matter up to a factor only.

    Args:
        log_score: [N, V].
        room: log of what the exponentials are multiplied by, if that is more than 0.
    """
    log_score = log_score.double()
    most = log_score.amax(-1, keepdim=True) + room.double().clamp(min=0.0).to(log_score.device)
    excess = (most - LARGEST_EXPONENT).clamp(min=0.0)
    return log_score - excess, excess


def tweedie_move(process: ForwardProcess) -> Move:
    """The exact law of x_s under the score (Thm. 4.2, arXiv:2310.16834)."""

    def move(log_score: Tensor, before: Tensor, interval: Interval) -> Tensor:
        alpha_s = interval.alpha_s.to(before.device).expand(len(before))
        alpha_t = interval.alpha_t.to(before.device).expand(len(before))
        log_score, _ = bounded(log_score, (interval.alpha_s / interval.alpha_t).log())
        back = process.staggered_score(log_score, alpha_s, alpha_t)
        return back * process.likelihood(before, alpha_s, alpha_t)

    return move
