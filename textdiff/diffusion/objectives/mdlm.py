"""Masked diffusion with the SUBS parameterisation (Sec. 3.2, arXiv:2406.07524).

The mask never has probability and visible tokens are carried over, so the bound is weighted
cross-entropy at masked positions: -alpha' / (1 - alpha) by time, n / k by count (arXiv:2406.03736).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.objective import Objective, Prediction
from textdiff.diffusion.process import Vocabulary


@dataclass(frozen=True)
class MDLM(Objective):
    """Cross-entropy at masked positions.

    Attributes:
        vocabulary: which rows are clean tokens.
        loss_weight: `elbo` trains on the bound, `ce` on plain cross-entropy: every masked token
            counts alike, whatever the mask rate. The reported bound is the same.
    """

    vocabulary: Vocabulary
    loss_weight: str = "elbo"

    def positions(self, xt: Tensor) -> Tensor:
        return xt == self.vocabulary.mask_token_id

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        wide = logits.double() if logits.dtype == torch.float64 else logits.float()
        return Prediction(wide.masked_fill(~self.vocabulary.clean, -torch.inf).log_softmax(-1))

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        log_p = prediction.log_x0.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
        return -(noise.weight * log_p.double())

    def training_scale(self, noise: Noise) -> Tensor:
        if self.loss_weight == "elbo":
            return torch.ones_like(noise.weight)
        # Two, because half the tokens are masked on average: the loss stays in nats per token.
        return 2.0 / noise.weight

    def boundary_terms(self) -> dict[str, float]:
        return {"reconstruction": 0.0, "prior": 0.0}
