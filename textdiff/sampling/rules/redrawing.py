"""The walk that draws every open position anew at every step.

Under noise that replaces tokens no position is finished before the last step. Letters: N open
positions, V vocabulary, T steps; s is the end of a step, t its beginning, alpha_s > alpha_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textdiff.errors import ConfigError
from textdiff.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess
    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.segment import Segment, Step

    Transition = Callable[[Prediction, Tensor, "Interval"], Tensor]
    """transition(prediction, tokens [N], interval) -> [N, V] float64 weights of the next tokens.

    The prediction is the network's after the controls.
    """


@dataclass(frozen=True)
class Interval:
    """One step of the grid.

    Attributes:
        index: 0 for the first.
        steps: T.
        t: time at its beginning, float64 scalar like the others.
        alpha_t: survival probability at its beginning.
        alpha_s: at its end; exactly 1 at the end of the last step, whatever the schedule has there.
    """

    index: int
    steps: int
    t: Tensor
    alpha_t: Tensor
    alpha_s: Tensor

    @property
    def last(self) -> bool:
        """True where no noise is left at its end."""
        return self.index + 1 == self.steps

    def alphas(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_s and alpha_t for each of the tokens, [N] on their device."""
        size, device = len(tokens), tokens.device
        return self.alpha_s.to(device).expand(size), self.alpha_t.to(device).expand(size)


def even_times(steps: int) -> Tensor:
    """Return the T + 1 times of even steps from 1 down to 0, in float64."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def grid(schedule: NoiseSchedule, steps: int) -> list[Interval]:
    """Return even steps from t = 1 down to t = 0."""
    times = even_times(steps)
    alphas = schedule.alpha(times)
    alphas[-1] = 1.0
    return [Interval(i, steps, times[i], alphas[i], alphas[i + 1]) for i in range(steps)]


def redraw(segment: Segment, transition: Transition, greedy_tail: bool) -> Iterator[Step]:
    """Draw open positions from a transition, in `steps` calls.

    Args:
        segment: under absorbing noise, revealed tokens stay.
        transition: distribution of the next tokens.
        greedy_tail: take the likeliest clean tokens at the last step.
    """
    process = segment.process
    if segment.controls.constraint is not None and not process.replaces_tokens:
        raise ConfigError(
            "patterns and bans need positions that are chosen before their tokens, and with a "
            "learned schedule a token decides when it is revealed; leave them out",
            code="pattern_with_learned_schedule",
        )
    for interval in grid(segment.schedule, segment.steps):
        still = ~segment.frozen
        if not process.replaces_tokens:
            still = still & (segment.canvas == process.mask_token_id).cpu()
        positions = still.flatten().nonzero().squeeze(1)
        if not len(positions):
            return

        def weights(prediction: Prediction, tokens: Tensor, at: Interval = interval) -> Tensor:
            return transition(prediction, tokens, at)

        t = interval.t.expand(len(segment.canvas))
        greedy = greedy_tail and interval.last
        yield segment.redraw(positions, t, weights, interval.index, interval.last, greedy)


def ancestral_transition(process: ForwardProcess) -> Transition:
    """Return q(x_s | x_t) of the predicted clean tokens."""

    def transition(prediction: Prediction, tokens: Tensor, interval: Interval) -> Tensor:
        return process.posterior(
            prediction.log_x0, tokens, *interval.alphas(tokens), prediction.mixture
        )

    return transition
