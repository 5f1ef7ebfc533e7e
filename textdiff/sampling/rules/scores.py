"""Rules that follow scores, the ratios q(y) / q(x_t): Tweedie's exact step, and Euler's.

Where nothing of the text survives (alpha = 0) scores say nothing about time: they are all 0 under
absorbing noise and all 1 under uniform noise. From there the first step is drawn from the posterior
of the clean tokens that the score implies. The last is Tweedie's to no noise, without the mask (the
denoising step of App. C.2, arXiv:2310.16834). Letters: N open positions, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.sampling.rules.redrawing import ancestral_transition, redraw
from textdiff.sampling.rules.revising import RevisingRule
from textdiff.sampling.rules.unmasking import unmask_by_chance
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess
    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.rules.redrawing import Interval, Transition
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step

LARGEST_EXPONENT = 600.0
"""Sums of exponentials up to this one do not overflow float64, whatever the vocabulary."""


class ScoreRule(RevisingRule):
    """A rule that follows scores down an even grid of times, in at most `steps` calls."""

    greedy_tail: bool = Field(False, description="take the likeliest tokens at the last step")

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "uniform")
    task: ClassVar[str] = "follows scores of absorbing or uniform noise"
    needs_score: ClassVar[bool] = True
    chance: ClassVar[str] = "draws which tokens a step changes"

    @abstractmethod
    def rise(self, schedule: NoiseSchedule, interval: Interval) -> Tensor:
        """Return the scalar that turns a mask's summed scores into its chance to be revealed."""

    @abstractmethod
    def move(
        self, segment: Segment, log_score: Tensor, tokens: Tensor, interval: Interval
    ) -> Tensor:
        """Return [N, V] weights of the next tokens under uniform noise; negative ones mean 0."""

    def __call__(self, segment: Segment) -> Iterator[Step]:
        if segment.process.replaces_tokens:
            transition, revision = self._transition(segment), self.revision(segment)
            yield from redraw(segment, transition, revision, self.greedy_tail)
            return

        def chance(prediction: Prediction, interval: Interval) -> Tensor:
            score = prediction.log_score
            assert score is not None
            if interval.alpha_t == 0.0:
                return interval.alphas(score)[0]
            total = score.logsumexp(-1).double().exp()
            largest = torch.finfo(torch.float64).max
            return self.rise(segment.schedule, interval) * total.clamp(max=largest)

        yield from unmask_by_chance(segment, chance, self.greedy_tail)

    def _transition(self, segment: Segment) -> Transition:
        process = segment.process
        posterior = ancestral_transition(process)

        def transition(prediction: Prediction, tokens: Tensor, interval: Interval) -> Tensor:
            if interval.alpha_t == 0.0:
                return posterior(prediction, tokens, interval)
            log_score = prediction.log_score
            if log_score is None:  # controls have changed the distribution that it belonged to
                log_score = process.log_score(prediction.log_x0, tokens, interval.alphas(tokens)[1])
            weights = self.move(segment, log_score, tokens, interval).clamp(min=0.0)
            empty = weights.sum(-1, keepdim=True) == 0.0  # to rounding, where little survives
            # Elsewhere than on a CPU, asking would wait for the device.
            if weights.device.type != "cpu" or bool(empty.any()):
                weights = torch.where(empty, posterior(prediction, tokens, interval), weights)
            return weights

        return transition


class Tweedie(ScoreRule):
    """Follows the exact step of the score, position by position (Thm. 4.2, arXiv:2310.16834).

    Its authors' code calls it `analytic`. Under absorbing noise a mask is revealed with probability
    (alpha_s / alpha_t - 1) times the sum of its scores. It becomes y in proportion to its score of
    y. These are two draws, so no race in float32 cuts off the tail.
    """

    kind: Literal["tweedie"] = "tweedie"

    def rise(self, schedule: NoiseSchedule, interval: Interval) -> Tensor:
        """Return exp(sigma_t - sigma_s) - 1."""
        return interval.alpha_s / interval.alpha_t - 1.0

    def move(
        self, segment: Segment, log_score: Tensor, tokens: Tensor, interval: Interval
    ) -> Tensor:
        return _tweedie_move(segment.process, log_score, tokens, interval)


class Euler(ScoreRule):
    """Holds reverse rates constant over each step (tau-leaping, Sec. 4.1, arXiv:2310.16834).

    Position by position, x_s = y with probability [y = x_t] + (t - s) sigma'(t) Q(x_t, y) s(y);
    negative probabilities of large steps count as 0. Tweedie's step costs as much and is exact
    where the score is; score models were published with this baseline.
    """

    kind: Literal["euler"] = "euler"

    def rise(self, schedule: NoiseSchedule, interval: Interval) -> Tensor:
        """Return (t - s) sigma'(t)."""
        return -schedule.dalpha(interval.t) / interval.alpha_t / interval.steps

    def move(
        self, segment: Segment, log_score: Tensor, tokens: Tensor, interval: Interval
    ) -> Tensor:
        """Jump to each token at its rate, which is its score over K."""
        process = segment.process
        if interval.last:
            return _tweedie_move(process, log_score, tokens, interval)
        rise = self.rise(segment.schedule, interval)  # a number, which every device takes
        log_score, excess = _bounded(log_score, rise.log())
        jump = log_score.exp().where(process.vocabulary.clean, 0.0) / process.vocabulary.count
        jump = (rise * jump).scatter(-1, tokens[:, None], 0.0)
        stay = (-excess).exp() - jump.sum(-1, keepdim=True)
        return jump.scatter(-1, tokens[:, None], stay)


def _tweedie_move(
    process: ForwardProcess, log_score: Tensor, tokens: Tensor, interval: Interval
) -> Tensor:
    alphas = interval.alphas(tokens)
    log_score, _ = _bounded(log_score, (interval.alpha_s / interval.alpha_t).log())
    return process.staggered_score(log_score, *alphas) * process.likelihood(tokens, *alphas)


def _bounded(log_score: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N, V] float64 log-scores whose exponentials do not overflow, and the excess [N, 1].

    The excess, which was subtracted, is 0 except for scores near overflowing: weights matter up to
    a factor only.

    Args:
        log_score: [N, V].
        room: log of the factor that multiplies the exponentials, if that is more than 0.
    """
    log_score = log_score.double()
    most = log_score.amax(-1, keepdim=True) + room.double().clamp(min=0.0)
    excess = (most - LARGEST_EXPONENT).clamp(min=0.0)
    return log_score - excess, excess
