"""What every decoding rule takes and yields."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.controls import Controls


@dataclass(frozen=True)
class Step:
    """The canvas after one network call.

    Attributes:
        index: network calls of this kind so far, counted from 0 over the whole generation.
        t: [R] time of each row before the step.
        canvas: [R, L] tokens after the step; a new tensor each time.
        changed: [N] flat positions that changed.
        calls: network calls so far.
        draft: [R, L] canvas with every open position filled by its most likely token, if asked for.
        confidence: [N] probability of each new token, if asked for.
        entropy: [N] entropy in nats at the changed positions, if asked for.
        remasked: [N] flat positions that were masked again, for rules that do so.
    """

    index: int
    t: Tensor
    canvas: Tensor
    changed: Tensor
    calls: int
    draft: Tensor | None = None
    confidence: Tensor | None = None
    entropy: Tensor | None = None
    remasked: Tensor | None = None


Denoise = Callable[[Tensor, Tensor, Tensor], Prediction]
"""denoise(canvas [R, L], t [R], positions [N]) -> Prediction.

It runs the network on the rows it needs.
"""

Uniforms = Callable[[Stream, int], Tensor]
"""uniforms(stream, scheduled step) -> [R, L] float64, whatever rows share the batch."""


class Rule(Protocol):
    """A decoding rule: a generator over the steps that fill a canvas."""

    def __call__(
        self,
        denoise: Denoise,
        process: ForwardProcess,
        schedule: NoiseSchedule,
        canvas: Tensor,
        *,
        steps: int,
        frozen: Tensor,
        uniforms: Uniforms,
        controls: Controls,
    ) -> Iterator[Step]:
        """Fills the open positions of the canvas.

        Args:
            denoise: the network behind its objective, cache and layout.
            process: forward process.
            schedule: noise schedule.
            canvas: [R, L] tokens, open positions in the process's prior state.
            steps: denoising steps.
            frozen: [R, L] bool, positions that never change.
            uniforms: source of randomness.
            controls: temperature and truncation.
        """
        ...
