"""Estimators that draw one noise level per block: a number of masked tokens, or a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.diffusion.noise import ByCount, ByTime, draw_noise
from textdiff.lazy import torch
from textdiff.likelihood.estimators.estimator import BOUNDARY, Estimator
from textdiff.likelihood.estimators.window_batch import WindowBatch, strata
from textdiff.section import Number, Whole

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Family
    from textdiff.likelihood.estimators.estimator import Parts
    from textdiff.likelihood.scorer import Scorer
    from textdiff.likelihood.windows import Windows


class MaskedCount(Estimator):
    """Random numbers of masked tokens: the bound, for all noise in continuous time.

    Unbiased for every process (Eq. 3.8, arXiv:2406.03736): k ~ U{1..n} masked tokens, weight n / k,
    no cut-off in time. Networks that read the noise level get the rate that goes with the count,
    Beta(k, n - k + 1). Two samples with counts in strata take more than twice the variance off a
    document of one window, whose cost grows with the count.
    """

    kind: Literal["masked_count"] = "masked_count"
    samples: Whole = Field(2, ge=1, description="noise draws per window and replicate")

    continuous: ClassVar[bool] = True

    @property
    def draws(self) -> int:
        return self.samples

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        nats = batch.zeros()
        for s in range(self.samples):
            uniforms = batch.noise_uniforms(batch.v[:, s], s, self.samples)
            noise = draw_noise(batch.family, batch.x0, uniforms, ByCount(), batch.scorable)
            nats += scorer.nats(batch.x0, noise, batch.real) / self.samples
        return {"diffusion": nats}


class Time(Estimator):
    """Random times from eps on, as published, with what is missing there added.

    Uniform times in [eps, 1], stratified over all windows (Sec. 3.5, arXiv:2406.07524). Their
    variance grows like log(1 / eps): this is here to be compared with. Published evaluations add
    neither the part before eps nor the prior, and do not weight times by the 1 - eps they cover:
    they are not `complete`.
    """

    kind: Literal["time"] = "time"
    eps: Number = Field(1e-3, ge=0.0, lt=1.0, description="earliest time")
    complete: bool = True

    continuous: ClassVar[bool] = True
    caveat: ClassVar[str] = (
        "rare times near 0 weigh much, and replicates that miss them state too small an error: "
        "for texts of a few tokens, 95 % intervals hold the truth 90 to 94 % of the time"
    )

    @property
    def parts(self) -> tuple[str, ...]:
        return BOUNDARY if self.complete else ("diffusion",)

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


def survival(family: Family, time: float) -> float:
    """Return alpha(t) at one time."""
    return float(family.schedule.alpha(torch.tensor([time], dtype=torch.float64)))


def clean_end(batch: WindowBatch, scorer: Scorer, time: float, draw: int, draws: int) -> Tensor:
    """Return the nats of one draw of -log p(x_0 | x_t) at a given time, [B, L].

    Args:
        batch: the windows.
        scorer: the network; it is not run where nothing is noisy by then.
        time: t.
        draw: the batch's draw to use.
        draws: how many it has per replicate.
    """
    from textdiff.likelihood.scorer import reconstruction

    rate = 1.0 - survival(batch.family, time)
    if rate == 0.0:
        return batch.zeros()
    levels = torch.zeros(len(batch.x0), batch.blocks.count, dtype=torch.float64)  # [B, blocks]
    uniforms = batch.noise_uniforms(levels, draw, draws)
    noise = draw_noise(batch.family, batch.x0, uniforms, ByTime((rate, rate)), batch.scorable)
    return scorer.nats(batch.x0, noise, batch.real, reconstruction)


def prior_nats(batch: WindowBatch) -> Tensor:
    """Return the nats of the prior at every scorable position, [B, L]; 0 where infinite."""
    kl = batch.family.process.prior_kl(survival(batch.family, 1.0))
    return batch.scorable.double() * (kl if math.isfinite(kl) else 0.0)


def infinite_prior(family: Family) -> str:
    """Return a note on a prior that has to be dropped; empty if it is finite."""
    alpha = survival(family, 1.0)
    if math.isfinite(family.process.prior_kl(alpha)):
        return ""
    return (
        f"the prior's term is infinite (at the end of time {alpha:.3g} of the tokens are still "
        "visible) and was left out"
    )
