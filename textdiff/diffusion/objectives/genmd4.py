"""Masked diffusion with a learned exponent per token (GenMD4, Sec. 6, arXiv:2406.04329).

A masked token v is revealed between t and s = t - h with probability 1 - (s / t) ** w_v, which is
h w_v / t to first order. The model reveals v with c(v) times that, so the divergence of its
reverse transition from the true one is (Eq. 12 there), per unit of time,

    (1 / t) (-w_x (ln c(x) + 1) + sum_v w_v c(v)).

Nothing is missing at the ends: at t = 0 every token is there, at t = 1 none is. Where all w are
equal it is (w / t) times cross-entropy. The best c is p(x_0 = v | x_t), which depends on t.
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
from textdiff.diffusion.process import AbsorbingByToken


@dataclass(frozen=True)
class GenMD4(Objective):
    """The bound under noise by token, at masked positions.

    Attributes:
        process: the absorbing process with an exponent per token.
        loss_weight: `elbo` alone: exponents learned from anything else than the bound would not
            tighten it.
    """

    process: AbsorbingByToken
    loss_weight: str = "elbo"

    heavy_tailed: ClassVar[bool] = False
    processes: ClassVar[tuple[str, ...]] = ("absorbing by token",)

    def __post_init__(self) -> None:
        if self.loss_weight != "elbo":
            raise ValueError("a learned schedule is trained on the bound: set loss_weight: elbo")

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        return Prediction(clean_log_softmax(logits, self.vocabulary), mixture=True)

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        paces = self.process.token_exponents
        pace, c = paces[x0], prediction.log_x0.exp()
        # No matrix product: autocast would round it. And w_x times the sum of c, which is 1 only to
        # rounding, so that equal exponents cancel.
        total = (c * paces.to(c.dtype)).sum(-1, dtype=paces.dtype)
        total = total - pace * c.sum(-1, dtype=paces.dtype)
        return noise.weight * (total - pace * pick(prediction.log_x0, x0))
