"""Masked diffusion with the SUBS parameterisation (Sec. 3.2, arXiv:2406.07524).

The mask never has probability and visible tokens are carried over, so the bound is weighted
cross-entropy at masked positions: -alpha' / (1 - alpha) by time, n / k by count (arXiv:2406.03736),
T (alpha_s - alpha_t) / (1 - alpha_t) in T steps.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.objective import (
    Objective,
    Prediction,
    clean_log_softmax,
    pick,
)

CLIP = 2.0
"""Largest weight with `loss_weight: clipped`; plain cross-entropy has it everywhere."""


@dataclass(frozen=True)
class MDLM(Objective):
    """Cross-entropy at masked positions.

    Attributes:
        process: the absorbing process.
        loss_weight: `elbo` trains on the bound, `ce` on plain cross-entropy: every masked token
            counts alike, whatever the mask rate; `clipped` on the bound with weights of at most 2.
            The reported bound is the same.
    """

    loss_weight: str = "elbo"

    heavy_tailed: ClassVar[bool] = False
    processes: ClassVar[tuple[str, ...]] = ("absorbing",)

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        return Prediction(clean_log_softmax(logits, self.vocabulary))

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        return -(noise.weight * pick(prediction.log_x0, x0))

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        if self.loss_weight == "ce":
            # Two, because half the tokens are masked on average: the loss stays in nats per token.
            return nelbo * (CLIP / noise.weight)
        if self.loss_weight == "clipped":
            return nelbo * (CLIP / noise.weight).clamp(max=1.0)
        return nelbo


@dataclass(frozen=True)
class AR(MDLM):
    """Left to right: blocks of one token, and a causal network that reads tokens one late.

    A block of one token is hit whole, with weight 1: its bound is its likelihood, exactly.
    """

    shifted: ClassVar[bool] = True
