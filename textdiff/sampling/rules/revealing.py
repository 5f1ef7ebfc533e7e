"""Masks revealed one step after another with a probability that depends on the prediction.

Whether a mask is revealed is decided before, and apart from, what it becomes: two draws, so no race
in float32 cuts off the tail of the vocabulary. Letters: N masked positions, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens
from textdiff.sampling.rules.redrawing import Interval, grid
from textdiff.sampling.rules.rule import Denoise, Step, Uniforms

Chance = Callable[[Prediction, Interval], Tensor]
"""chance(prediction, interval) -> [N] probability that each mask is revealed in this step."""


def reveal_by_chance(
    denoise: Denoise,
    process: ForwardProcess,
    schedule: NoiseSchedule,
    canvas: Tensor,
    *,
    steps: int,
    frozen: Tensor,
    uniforms: Uniforms,
    controls: Controls,
    chance: Chance,
    greedy_tail: bool,
) -> Iterator[Step]:
    """Fill the open positions in at most `steps` calls; the last one reveals what is left."""
    masked = ~frozen
    u = uniforms(Stream.TOKEN, 0).flatten()
    for interval in grid(schedule, steps):
        positions = masked.flatten().nonzero().squeeze(1)
        if not len(positions):
            return
        t = interval.t.expand(len(canvas))
        prediction = denoise(canvas, t, positions)
        hit = torch.ones(len(positions), dtype=torch.bool)
        if not interval.last:
            v = uniforms(Stream.POSITION, interval.index).flatten()[positions]
            hit = v < chance(prediction, interval).cpu()
        revealed = positions[hit]
        here = revealed.to(canvas.device)
        log_x0 = prediction.log_x0[hit.to(canvas.device)]
        chosen = controls.cold() if greedy_tail and interval.last else controls
        context = Context(canvas, revealed, t, process.vocabulary)
        tokens = draw_tokens(log_x0, u[revealed].to(canvas.device), chosen, context)
        canvas = canvas.flatten().index_copy(0, here, tokens).view_as(canvas)
        masked = masked.flatten().index_fill(0, revealed, False).view_as(masked)
        yield Step(interval.index, t, canvas, revealed, interval.index + 1)
