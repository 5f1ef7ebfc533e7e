"""A tighter bound from several orders at once."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream
from textdiff.likelihood.estimators.estimator import Estimator, Parts, require_time_free
from textdiff.likelihood.estimators.orders import chain
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class Importance(Estimator):
    """-log of the mean likelihood over K random orders (Eq. 8, arXiv:1509.00519, over orders).

    K = 1 is the negative ELBO; the expectation never rises with K and falls to the order-averaged
    likelihood of the model. Orders are drawn per block, so every block has its own mean.

    Attributes:
        orders: K.
    """

    orders: int = 8

    name: ClassVar[str] = "importance"
    attributes: ClassVar[bool] = False

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_time_free(self.name, denoiser, family)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        chains = []
        for k in range(self.orders):
            u = batch.uniforms(Stream.POSITION, k, self.orders)
            chains.append(batch.blocks.split(chain(batch, u, scorer), 0.0).sum(-1))
        nats: Tensor = math.log(self.orders) - (-torch.stack(chains)).logsumexp(0)  # [B, blocks]
        share = nats / batch.sizes.clamp(min=1)  # spread evenly: nobody's in particular
        return {"diffusion": batch.blocks.spread(share) * batch.scorable}
