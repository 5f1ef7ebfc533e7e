"""What the rules share that draw every open position anew at every step.

Under noise that draws tokens no position is ever finished before the last step. Letters: N open
positions, V vocabulary, T steps; s is the end of a step, t its beginning, alpha_s > alpha_t.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.errors import ConfigError
from textdiff.sampling.contrast import Contrast
from textdiff.sampling.draws import draw_weighed, inverse_cdf
from textdiff.sampling.segment import Segment, Step


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
        """Whether no noise is left at its end."""
        return self.index + 1 == self.steps


Law = Callable[[Prediction, Tensor, Interval], Tensor]
"""law(prediction, tokens [N], interval) -> [N, V] float64 weights of the next tokens.

The prediction is what controls have made of the network's.
"""


def grid(schedule: NoiseSchedule, steps: int) -> list[Interval]:
    """Even steps from t = 1 down to t = 0."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    alphas = schedule.alpha(times)
    alphas[-1] = 1.0
    return [Interval(i, steps, times[i], alphas[i], alphas[i + 1]) for i in range(steps)]


def redraw(segment: Segment, law: Law, greedy_tail: bool = False) -> Iterator[Step]:
    """Draw what is open from `law`, in `steps` calls; masks only where revealed tokens stay.

    Args:
        segment: its open positions are drawn.
        law: distribution of the next tokens.
        greedy_tail: take the likeliest clean tokens at the last step.
    """
    process, controls = segment.process, segment.controls
    if controls.constraint is not None and not process.replaces_tokens:
        raise ConfigError(
            "patterns and bans need positions that are chosen before their tokens, and with a "
            "learned schedule a token decides when it is revealed; leave them out"
        )
    for interval in grid(segment.schedule, segment.steps):
        still = ~segment.frozen
        if not process.replaces_tokens:  # what is revealed stays
            still = still & (segment.canvas == process.mask_token_id).cpu()
        positions = still.flatten().nonzero().squeeze(1)
        if not len(positions):
            return
        t = interval.t.expand(len(segment.canvas))
        prediction = segment.predict(positions, t)
        before = segment.tokens(positions)
        chosen = controls.cold() if greedy_tail and interval.last else controls
        context = segment.context(positions, t)
        taken = chosen.applied(prediction, context)
        weights = _weights(law, process, taken, before, interval)
        if interval.last:  # a token that is impossible has no chance from rounding either
            weights = _possible(weights, taken.log_x0)
        u = segment.token_uniforms(positions, interval.index)
        # A constraint is on finished text: what noise passes through on the way is not.
        finish = draw_weighed(weights, u, chosen, context) if interval.last else None
        tokens = inverse_cdf(weights, u) if finish is None else finish
        segment.put(positions, tokens)
        yield segment.step(positions[(tokens != before).cpu()], t)


def _weights(
    law: Law, process: ForwardProcess, taken: Prediction, before: Tensor, interval: Interval
) -> Tensor:
    """[N, V] the law of the next tokens; guided ones are mixed where a token was noised."""
    if not isinstance(taken, Contrast) or not process.replaces_tokens:
        return law(taken, before, interval)
    mixed = taken.mixed(lambda part: law(part, before, interval))
    if not process.has_mask:
        return mixed
    masked = (before == process.mask_token_id)[:, None]
    return torch.where(masked, law(taken, before, interval), mixed)


def _possible(weights: Tensor, log_x0: Tensor) -> Tensor:
    """[N, V] weights of possible clean tokens; their probabilities where no weight is left."""
    weights = weights.where(log_x0 > -torch.inf, 0.0)
    return torch.where(weights.sum(-1, keepdim=True) == 0.0, log_x0.double().exp(), weights)


def ancestral_law(process: ForwardProcess) -> Law:
    """q(x_s | x_t) of the predicted clean tokens."""

    def law(prediction: Prediction, before: Tensor, interval: Interval) -> Tensor:
        return process.posterior(
            prediction.log_x0,
            before,
            interval.alpha_s.to(before.device).expand(len(before)),
            interval.alpha_t.to(before.device).expand(len(before)),
            prediction.mixture,
        )

    return law
