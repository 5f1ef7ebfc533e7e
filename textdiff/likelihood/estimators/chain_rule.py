"""Left to right: the likelihood of the same network as an autoregressive model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from textdiff.diffusion.family import Family
from textdiff.likelihood.estimators.estimator import Estimator, Parts, require_time_free
from textdiff.likelihood.estimators.orders import chain
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class ChainRule(Estimator):
    """-log p(x) with tokens revealed left to right: exact, of a model that decodes in this order.

    It is the likelihood of *that* model, and no bound on the diffusion's, which averages over
    orders.
    """

    name: ClassVar[str] = "chain_rule"
    exact: ClassVar[bool] = True

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_time_free(self.name, denoiser, family)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        length = batch.x0.shape[1]
        first = 1.0 - (torch.arange(length, dtype=torch.float64) + 0.5) / length
        return {"diffusion": chain(batch, first.expand(batch.x0.shape), scorer)}
