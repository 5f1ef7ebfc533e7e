"""What every decoding rule takes and yields."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
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
        changed: [N] flat host positions that changed.
        calls: network calls so far.
        draft: [R, L] canvas with every open position filled by its most likely token, if asked for.
        confidence: [N] raw probability of each new token, if asked for; NaN for masks.
        entropy: [N] entropy in nats at the changed positions, if asked for or known anyway; NaN
            where a token was masked again.
        remasked: [M] flat host positions that were masked again, for rules that do so.
        final: [R] tokens of each row that were final before this step; the block loop knows, as it
            does what follows.
        ends: [R] tokens up to the end of each row's segment; `final` for rows without one.
        done: [R] bool, rows that were finished before this step.
        rows: rows that the network has run on so far.
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
    final: Tensor | None = None
    ends: Tensor | None = None
    done: Tensor | None = None
    rows: int = 0

    @property
    def dependence(self) -> Tensor | None:
        """[R] nats that revealing the changed positions at once may cost; needs `entropy`.

        The sum of their entropies less the largest bounds their total correlation, so that the sum
        over steps, on average over texts, bounds the divergence from revealing them one by one if
        the network's conditionals are those of one joint law (arXiv:2505.24857).
        """
        if self.entropy is None:
            return None
        rows, width = self.canvas.shape
        row, nats = self.changed // width, self.entropy.double().nan_to_num(0.0)
        zero = torch.zeros(rows, dtype=torch.float64)
        largest = zero.scatter_reduce(0, row, nats, "amax")
        return zero.index_add(0, row, nats) - largest


Denoise = Callable[[Tensor, Tensor, Tensor], Prediction]
"""denoise(canvas [R, L], t [R], positions [N]) -> Prediction.

It runs the network on the rows it needs.
"""

Uniforms = Callable[[Stream, int], Tensor]
"""uniforms(stream, scheduled step) -> [R, L] float64, whatever rows share the batch."""


@dataclass(frozen=True)
class Rule(ABC):
    """A decoding rule and its knobs: called, it walks the steps that fill a canvas.

    Knobs are the fields of a rule; `dataclasses.replace` sets them, and values out of range are a
    ConfigError. What becomes of a row depends on the row alone, whoever shares its batch.

    Attributes:
        processes: names of the forward processes that the rule is defined for.
        otherwise: what to say, after "rule ... ", to those who have another process.
        needs_score: whether it walks along scores, which only some objectives predict.
        reveals_ahead: whether masks are revealed at times that the network has no part in.
    """

    processes: ClassVar[tuple[str, ...]]
    otherwise: ClassVar[str] = ""
    needs_score: ClassVar[bool] = False
    reveals_ahead: ClassVar[bool] = False

    def refusal(self, family: Family) -> str | None:
        """Why the rule does not fit a family, as the end of a sentence; None: it does."""
        if family.process.name not in self.processes:
            return f"{self.otherwise}, and noise here is {family.process.name}"
        if self.needs_score and not family.objective.predicts_score:
            return "walks along scores, which this objective does not predict"
        if self.reveals_ahead and family.objective.predicts_mask:
            return f"{self.otherwise}, and here the network predicts masks, too"
        return None

    def suited(self, family: Family) -> "Rule":
        """The rule as it runs on a family, with the same knobs; here itself."""
        return self

    @abstractmethod
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
            steps: denoising steps, and most network calls of a row.
            frozen: [R, L] bool on the host, positions that never change.
            uniforms: source of randomness.
            controls: how the law of tokens departs from the model's.
        """
