"""Random orders with all their terms: n rows per window, each for the token revealed next."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream
from textdiff.likelihood.estimators.estimator import (
    Estimator,
    Parts,
    require_continuous,
    require_time_free,
)
from textdiff.likelihood.estimators.orders import chain
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer, nelbo
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class AnyOrder(Estimator):
    """The bound as a mean over orders of their chains (Eq. 2, arXiv:2110.02037).

    Every token is scored once, given those before it. Scoring all masked tokens in every row, not
    only the next one, looks like a free average and is none: along one order, what a token leaves
    unsaid the others say, and the more consistent the model the less their sum varies.

    Attributes:
        samples: orders per window and replicate.
    """

    samples: int = 1

    name: ClassVar[str] = "any_order"

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)
        require_time_free(self.name, denoiser, family)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        nats = torch.zeros(batch.x0.shape, dtype=torch.float64)
        for s in range(self.samples):
            u = batch.uniforms(Stream.POSITION, s, self.samples)
            nats += chain(batch, u, scorer, nelbo) / self.samples
        return {"diffusion": nats}
