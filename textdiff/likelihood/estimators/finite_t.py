"""The bound of a process in T steps."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from textdiff.diffusion.family import Family
from textdiff.diffusion.objectives import MDLM
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.boundary import clean_end, infinite_prior, prior_nats
from textdiff.likelihood.estimators.estimator import BOUNDARY, Estimator, Parts
from textdiff.likelihood.estimators.steps import ByStepAndHits
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class FiniteT(Estimator):
    """Random steps of T (Eq. 8, arXiv:2406.07524; Eq. 1, arXiv:2107.03006), drawn with their hits.

    The first step's term is the reconstruction: it is part of `diffusion`.

    Attributes:
        timesteps: T; None: the model's own.
        samples: draws per window and replicate, with steps in strata.
    """

    timesteps: int | None = None
    samples: int = 2

    name: ClassVar[str] = "finite_t"

    @property
    def draws(self) -> int:
        return self.samples

    @property
    def parts(self) -> tuple[str, ...]:
        return BOUNDARY

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        if self._steps(family) is None:
            raise ConfigError(
                "estimator finite_t needs a number of steps, and this model is of continuous time; "
                "give timesteps"
            )
        if family.timesteps is None and not isinstance(family.objective, MDLM):
            raise ConfigError(
                "estimator finite_t: this objective's terms are those of continuous time; use "
                "masked_count or time"
            )

    def missing(self, family: Family) -> str:
        return infinite_prior(family)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        steps = self._steps(batch.family)
        assert steps is not None
        nats = torch.zeros(batch.x0.shape, dtype=torch.float64)
        for s in range(self.samples):
            uniforms = batch.noise_uniforms(batch.v[:, s], s, self.samples)
            noise = ByStepAndHits(steps)(batch.family, uniforms, batch.scorable)
            nats += scorer.nats(batch.x0, noise, batch.real) / self.samples
        # Draws of other replicates' numbers from 2 ** 40 on: no diffusion draw has them.
        apart = replace(batch, replicate=batch.replicate + 2**40)
        clean = clean_end(apart, scorer, 0.0, 0, 1)
        return {"diffusion": nats, "reconstruction": clean, "prior": prior_nats(batch)}

    def _steps(self, family: Family) -> int | None:
        return self.timesteps or family.timesteps
