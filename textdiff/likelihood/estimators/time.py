"""The published form: one random time per window, cut off near the clean end."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.makers import ByTime, draw_noise
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.boundary import (
    clean_end,
    infinite_prior,
    prior_nats,
    survival,
)
from textdiff.likelihood.estimators.estimator import (
    BOUNDARY,
    Estimator,
    Parts,
    require_continuous,
)
from textdiff.likelihood.estimators.strata import strata
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class Time(Estimator):
    """Uniform times in [eps, 1], stratified over all windows (Sec. 3.5, arXiv:2406.07524).

    Its variance grows like log(1 / eps): it is here to be compared with.

    Attributes:
        eps: earliest time.
        complete: whether the part before `eps` and the prior are added, and times are weighted by
            the 1 - eps that they cover. Published evaluations do neither.
    """

    eps: float = 1e-3
    complete: bool = True

    name: ClassVar[str] = "time"
    caveat: ClassVar[str] = (
        "rare times near 0 weigh much, and replicates that miss them state too small an error: "
        "for texts of a few tokens, 95 % intervals hold the truth 90 to 94 % of the time"
    )

    @property
    def parts(self) -> tuple[str, ...]:
        return BOUNDARY if self.complete else ("diffusion",)

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)
        if not 0.0 <= self.eps < 1.0:
            raise ConfigError(f"eps {self.eps}: give a time from 0 up to 1")

    def missing(self, family: Family) -> str:
        if self.complete:
            return infinite_prior(family)
        return (
            f"the mean over times in [{self.eps:g}, 1], with neither the reconstruction of what is "
            "noisy by then nor the prior"
        )

    def strata(self, windows: Windows, family: Family, seed: int, replicate: int) -> Tensor:
        return strata(windows, family, seed, replicate, by_document=False)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        rates = 1.0 - survival(batch.family, self.eps), 1.0 - survival(batch.family, 1.0)
        uniforms = batch.noise_uniforms(batch.v[:, 0], 0, 2)
        noise = draw_noise(batch.family, batch.x0, uniforms, ByTime(rates), batch.scorable)
        nats = scorer.nats(batch.x0, noise, batch.real)
        if not self.complete:
            return {"diffusion": nats}
        return {
            "diffusion": (1.0 - self.eps) * nats,
            "reconstruction": clean_end(batch, scorer, self.eps, 1, 2),
            "prior": prior_nats(batch),
        }
