"""The default: k ~ U{1..n} masked tokens, weight n / k, no cut-off in time."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import ByCount, draw_noise
from textdiff.likelihood.estimators.estimator import Estimator, Parts, require_continuous
from textdiff.likelihood.estimators.view import View
from textdiff.likelihood.protocols import Windows
from textdiff.likelihood.scorer import Scorer
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class MaskedCount(Estimator):
    """The unbiased estimator by counts, for every process (Eq. 3.8, arXiv:2406.03736).

    Networks that see the noise level get the rate that goes with the count, Beta(k, n - k + 1).

    Attributes:
        samples: draws per window and replicate, with counts in strata: two take more than twice the
            variance off a document of one window, whose cost grows with the count.
    """

    samples: int = 2

    name: ClassVar[str] = "masked_count"

    @property
    def draws(self) -> int:
        return self.samples

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)

    def score(self, view: View, scorer: Scorer) -> Parts:
        nats = torch.zeros(view.x0.shape, dtype=torch.float64)
        for s in range(self.samples):
            uniforms = view.noise_uniforms(view.v[:, s], s, self.samples)
            noise = draw_noise(view.family, view.x0, uniforms, ByCount(), view.scorable)
            nats += scorer.nats(view.x0, noise, view.real) / self.samples
        return {"diffusion": nats}
