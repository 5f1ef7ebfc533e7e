"""Masks revealed one step after another with a probability that depends on the prediction.

Whether a mask is revealed is decided before, and apart from, what it becomes: two draws, so no race
in float32 cuts off the tail of the vocabulary. Letters: N masked positions, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream
from textdiff.sampling.rules.redrawing import Interval, grid
from textdiff.sampling.segment import Segment, Step

Chance = Callable[[Prediction, Interval], Tensor]
"""chance(prediction, interval) -> [N] probability that each mask is revealed in this step."""


def reveal_by_chance(segment: Segment, chance: Chance, greedy_tail: bool) -> Iterator[Step]:
    """Fill the open positions in at most `steps` calls; the last one reveals what is left."""
    masked = ~segment.frozen
    for interval in grid(segment.schedule, segment.steps):
        positions = masked.flatten().nonzero().squeeze(1)
        if not len(positions):
            return
        t = interval.t.expand(len(segment.canvas))
        prediction = segment.predict(positions, t)
        hit = torch.ones(len(positions), dtype=torch.bool)
        if not interval.last:
            u = segment.uniforms(Stream.POSITION, interval.index).flatten()[positions]
            hit = u < chance(prediction, interval).cpu()
        revealed = positions[hit]
        log_x0 = prediction.log_x0[hit.to(segment.canvas.device)]
        controls = segment.controls.cold() if greedy_tail and interval.last else None
        segment.put(revealed, segment.draw(revealed, log_x0, t, controls=controls))
        masked = masked.flatten().index_fill(0, revealed, False).view_as(masked)
        yield segment.step(revealed, t)
