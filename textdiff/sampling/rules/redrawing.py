"""The walk that draws every open position anew at every step.

Under noise that replaces tokens no position is finished before the last step. Letters: N open
positions, V vocabulary, T steps; s is the end of a step, t its beginning, alpha_s > alpha_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textdiff.sampling.parts import posterior_prediction
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess
    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.positions import Positions
    from textdiff.sampling.rules.revising import Revision
    from textdiff.sampling.segment import CleanTokens, Segment
    from textdiff.sampling.step import Step

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
        # Filled there: nothing is copied.
        alphas = (float(alpha) for alpha in (self.alpha_s, self.alpha_t))
        alpha_s, alpha_t = (
            torch.full((size,), alpha, dtype=torch.float64, device=device) for alpha in alphas
        )
        return alpha_s, alpha_t


def even_times(steps: int) -> Tensor:
    """Return the T + 1 times of even steps from 1 down to 0, in float64."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)


def grid(schedule: NoiseSchedule, steps: int) -> list[Interval]:
    """Return even steps from t = 1 down to t = 0."""
    times = even_times(steps)
    alphas = schedule.alpha(times)
    alphas[-1] = 1.0
    return [Interval(i, steps, times[i], alphas[i], alphas[i + 1]) for i in range(steps)]


def redraw(
    segment: Segment,
    transition: Transition,
    revision: Revision,
    greedy_tail: bool,
    steps: int | None = None,
) -> Iterator[Step]:
    """Draw open positions from a transition, in at most `steps` calls.

    Args:
        segment: what is filled.
        transition: distribution of the next tokens.
        revision: which of its rows are revised; under absorbing noise, revealed tokens stay.
        greedy_tail: take the likeliest clean tokens at the last step.
        steps: None: those of the segment.
    """
    end: CleanTokens = "likeliest" if greedy_tail else "drawn"
    for interval in grid(segment.schedule, segment.steps if steps is None else steps):
        if revision.none_left:
            return
        positions = revision.positions()
        t = interval.t.expand(len(segment.canvas))
        prediction = segment.predict(positions, t)
        ended = None
        if revision.stops_early and not interval.last:
            ended = _end(segment, positions, prediction, interval, revision)
        chosen = segment.chosen(positions, revision.still(positions))

        def weights(prediction: Prediction, tokens: Tensor, at: Interval = interval) -> Tensor:
            return transition(prediction, tokens, at)

        clean = end if interval.last else None
        moved = segment.redraw(chosen, prediction, t, weights, interval.index, clean)
        if not revision.was_needed():
            return
        if ended is not None:
            ended[chosen.predicted] |= moved
            moved = ended
        yield segment.step(positions, t, moved=moved)


def _end(
    segment: Segment,
    positions: Positions,
    prediction: Prediction,
    interval: Interval,
    revision: Revision,
) -> Tensor:
    """Write the likeliest texts of stable rows; return their positions, [N] bool on the device."""
    tokens = segment.tokens(positions)
    alpha_t = interval.alphas(tokens)[1]
    posterior = posterior_prediction(segment.process, prediction, tokens, alpha_t)
    ended = revision.end(positions, posterior, interval.t.expand(len(segment.canvas)))
    return segment.send(ended).clone()


def ancestral_transition(process: ForwardProcess) -> Transition:
    """Return q(x_s | x_t) of the predicted clean tokens."""

    def transition(prediction: Prediction, tokens: Tensor, interval: Interval) -> Tensor:
        return process.posterior(
            prediction.log_x0, tokens, *interval.alphas(tokens), prediction.mixture
        )

    return transition
