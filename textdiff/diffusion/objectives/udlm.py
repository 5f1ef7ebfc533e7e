"""Uniform noise in continuous time with the clean token's distribution plugged in.

The rate of the bound (Eq. 18, arXiv:2412.10193) is lambda / (alpha K q(x_t | x0)) times the
divergences of `mixture`, per unit of the masked bound's weight. It equals the score entropy of the
score that the plugged-in distribution has. Its optimum is the posterior of a token given the
*other* tokens of x_t, not given x_t itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.mixture import divergences
from textdiff.diffusion.objectives.objective import Objective, Prediction, clean_log_softmax


@dataclass(frozen=True)
class UDLM(Objective):
    """Continuous-time bound of uniform diffusion, at every position."""

    scores_all_positions: ClassVar[bool] = True
    processes: ClassVar[tuple[str, ...]] = ("uniform",)

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        return Prediction(clean_log_softmax(logits, self.vocabulary))

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        alpha, lost = noise.alpha, 1.0 - noise.alpha
        b = lost / self.vocabulary.count
        kl, itakura_saito = divergences(prediction.log_x0, x0, xt, alpha, b, self.vocabulary)
        q = torch.where(xt == x0, alpha + b, b)
        rate = lost / (alpha * self.vocabulary.count * q)
        return noise.weight * rate * (kl + itakura_saito)
