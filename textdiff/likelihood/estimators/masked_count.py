"""The default: k ~ U{1..n} masked tokens, weight n / k, no cut-off in time."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from textdiff.diffusion.family import Family
from textdiff.diffusion.makers import ByCount, draw_noise
from textdiff.likelihood.estimators.estimator import Estimator, Parts, require_continuous
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
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

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        nats = torch.zeros(batch.x0.shape, dtype=torch.float64)
        for s in range(self.samples):
            uniforms = batch.noise_uniforms(batch.v[:, s], s, self.samples)
            noise = draw_noise(batch.family, batch.x0, uniforms, ByCount(), batch.scorable)
            nats += scorer.nats(batch.x0, noise, batch.real) / self.samples
        return {"diffusion": nats}
