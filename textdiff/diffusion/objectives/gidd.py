"""Hybrid noise: masks and uniform tokens at once (arXiv:2503.04482).

The bound (Eq. 11 there) weights the divergences of `mixture` by what is at the position: the mask,
the clean token, or another token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.mdlm import CLIP
from textdiff.diffusion.objectives.mixture import divergences
from textdiff.diffusion.objectives.objective import Objective, Prediction, clean_log_softmax
from textdiff.diffusion.process import Hybrid


@dataclass(frozen=True)
class GIDD(Objective):
    """Continuous-time bound of hybrid diffusion, at every position.

    Attributes:
        process: the hybrid process.
        loss_weight: `elbo` trains on the bound; `clipped` on its rate per unit of time, clipped at
            2; `dynamic` gives masks 2, uniform tokens 1 and clean ones what is left of B / K at
            their noise level (Sec. 3.4). The reported bound is the same.
    """

    process: Hybrid
    loss_weight: str = "elbo"

    scores_all_positions: ClassVar[bool] = True
    processes: ClassVar[tuple[str, ...]] = ("hybrid",)

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        return Prediction(clean_log_softmax(logits, self.vocabulary))

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        _, b = self.process.shares(noise.alpha)
        kl, itakura_saito = divergences(prediction.log_x0, x0, xt, noise.alpha, b, self.vocabulary)
        time = self.process.schedule.t_of_alpha(noise.alpha)
        per_weight = 1.0 / self.process.schedule.elbo_weight(time)
        return noise.weight * per_weight * self.rate(x0, xt, time) * (kl + itakura_saito)

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        if self.loss_weight == "elbo":
            return nelbo
        time = self.process.schedule.t_of_alpha(noise.alpha)
        rate = self.rate(x0, xt, time)
        clipped = self.loss_weight == "clipped"
        wanted = rate.clamp(max=CLIP) if clipped else self._dynamic(x0, xt, time)
        return nelbo * (wanted / rate)

    def rate(self, x0: Tensor, xt: Tensor, time: Tensor) -> Tensor:
        """[N] weight of the divergences per unit of time."""
        schedule, count = self.process.schedule, self.vocabulary.count
        c, left = schedule.uniform_mass(time), 1.0 - time
        gain = c + left * schedule.uniform_mass_slope(time)
        masked = 1.0 / (time * left)
        clean = gain / count / (left * (left + c / count))
        other = gain / (left * c)
        rate = torch.where(xt == x0, clean, other)
        return torch.where(xt == self.vocabulary.mask_token_id, masked, rate)

    def _dynamic(self, x0: Tensor, xt: Tensor, time: Tensor) -> Tensor:
        """Weights by kind of token; log-SNR is logit(1 - t)."""
        half = (time / (1.0 - time)).sqrt()
        clean = self.process.schedule.scale / self.vocabulary.count * half
        weight = torch.where(xt == x0, clean, 1.0)
        return torch.where(xt == self.vocabulary.mask_token_id, 2.0, weight)
