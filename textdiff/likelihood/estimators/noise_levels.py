"""Estimators that draw one noise level per block: a number of masked tokens, a time or a step.

A bound in steps is drawn so that no weight is large. A step drawn uniformly, with independent
masks, weighs T (alpha_s - alpha_t) / lambda, lambda = 1 - alpha_t: T at the first steps of a linear
schedule, where hardly anything is masked. Here a step i has the chance p_i = (alpha_s - alpha_t) /
(alpha_0 - alpha_T). One of the n positions is masked in any case and the others independently with
probability lambda. A set of k positions then has the chance

    sum_i p_i (k / n) lambda_i ** (k - 1) (1 - lambda_i) ** (n - k),

of which the bound's terms are the share n (alpha_0 - alpha_T) / k: the weight is that of counts in
continuous time, and T = 1 has no variance at all.

Where positions that are not masked contribute too, nothing is masked in one of n + 1 draws. Its
step has a chance c_i of its own and the weight p_i (1 - lambda_i) ** n / (c_i lambda_i). The T-step
bound there, per unit of p_i, is bounded for a network that takes a clean text for what it is. For
one that does not it is in proportion to 1 / lambda_i, mostly in the first steps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.diffusion.noise import ByCount, ByTime, Noise, NoiseUniforms, draw_noise
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.estimator import BOUNDARY, NEVER, Estimator, WindowBatch, strata
from textdiff.section import Number, Whole, torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Blocks, Family
    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.likelihood.estimators.estimator import Parts
    from textdiff.likelihood.scorer import Scorer
    from textdiff.likelihood.windows import Windows
    from textdiff.models import Denoiser


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


class FiniteT(Estimator):
    """Random steps of T: the bound of a model in steps, looser than that of continuous time.

    (Eq. 8, arXiv:2406.07524; Eq. 1, arXiv:2107.03006), drawn with their masked positions. The first
    step's term is the reconstruction: it belongs to `diffusion`.
    """

    kind: Literal["finite_t"] = "finite_t"
    timesteps: Whole | None = Field(None, ge=1, description="T; by default the model's own")
    samples: Whole = Field(2, ge=1, description="noise draws per window and replicate")

    @property
    def draws(self) -> int:
        return self.samples

    @property
    def parts(self) -> tuple[str, ...]:
        return BOUNDARY

    def check(self, denoiser: Denoiser, family: Family, windows: Windows) -> None:
        if self._steps(family) is None:
            raise ConfigError(
                "estimator finite_t needs a number of steps, and this model is of continuous time; "
                "give timesteps",
                code="no_timesteps",
            )
        if family.timesteps is None and not family.objective.in_steps:
            raise ConfigError(
                "estimator finite_t: this objective's terms are those of continuous time; use "
                "masked_count or time",
                code="objective_in_continuous_time",
            )

    def missing(self, family: Family) -> str:
        return infinite_prior(family)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        steps, family = self._steps(batch.family), batch.family
        assert steps is not None
        nats = batch.zeros()
        for s in range(self.samples):
            uniforms = batch.noise_uniforms(batch.v[:, s], s, self.samples)
            dense = family.objective.scores_all_positions
            noise = noise_by_step_and_hits(
                family.schedule, steps, uniforms, batch.blocks, batch.scorable, dense
            )
            nats += scorer.nats(batch.x0, noise, batch.real) / self.samples
        # Draws of other replicates' numbers from 2 ** 40 on: no diffusion draw has them.
        apart = replace(batch, replicate=batch.replicate + 2**40)
        clean = clean_end(apart, scorer, 0.0, 0, 1)
        return {"diffusion": nats, "reconstruction": clean, "prior": prior_nats(batch)}

    def _steps(self, family: Family) -> int | None:
        return self.timesteps or family.timesteps


def noise_by_step_and_hits(
    schedule: NoiseSchedule,
    timesteps: int,
    uniforms: NoiseUniforms,
    blocks: Blocks,
    scorable: Tensor,
    dense: bool = False,
) -> Noise:
    """Return noise at one of T = `timesteps` grid points per block, one position masked at least.

    No weight is large; the module's head derives it.

    Args:
        schedule: gives alpha.
        uniforms: levels place the step; each block's smallest position is masked in any case.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be masked.
        dense: whether positions that are not masked contribute too.
    """
    v = uniforms.level  # [B, blocks]
    alphas = schedule.alpha(torch.arange(timesteps + 1, dtype=torch.float64) / timesteps)  # [T + 1]
    shares, total = alphas[:-1] - alphas[1:], alphas[0] - alphas[-1]
    n, bare = blocks.split(scorable, False).sum(-1), int(dense)  # draws of n + bare mask nothing
    empty = v * (n + bare) < bare
    step = _drawn(shares, ((v * (n + bare) - bare) / n.clamp(min=1)).clamp(min=0.0))
    rest = torch.zeros_like(v)
    for size in sorted(set(n[empty].tolist())):
        at, quiet = empty & (n == size), shares * alphas[1:] ** size
        chances = _chances_without_hits(quiet, 1.0 - alphas[1:])
        step[at] = _drawn(chances, v[at] * (size + bare))
        # Where every step masks something (T = 1), such a draw stands for nothing.
        rest[at] = (quiet / chances).where(quiet > 0.0, 0.0)[step[at]]
    alpha_s, alpha = alphas[step], alphas[step + 1]
    place = _above_smallest(uniforms.position, blocks, scorable)
    threshold = blocks.spread((1.0 - alpha).masked_fill(empty, 0.0))
    k = blocks.split(place < threshold, False).sum(-1).clamp(min=1)
    each = torch.where(empty, rest / (1.0 - alpha), total / k)
    weight = blocks.spread(((n + bare) * each).masked_fill(n == 0, 0.0))
    alpha, alpha_s = blocks.spread(alpha), blocks.spread(alpha_s)
    return Noise(alpha, threshold, place, weight, uniforms.token, alpha_s)


def _above_smallest(u: Tensor, blocks: Blocks, scorable: Tensor) -> Tensor:
    """Return uniforms [B, L] of which each block's smallest is 0: it is masked in any case."""
    place = u.masked_fill(~scorable, NEVER)
    first = blocks.spread(blocks.split(place, NEVER).amin(-1))
    # Given which is the smallest, the others are uniform above it.
    return ((place - first) / (1.0 - first)).masked_fill(~scorable, NEVER)


def _chances_without_hits(quiet: Tensor, rate: Tensor) -> Tensor:
    """Return how often each step is drawn when nothing is masked, [T].

    If the network takes the text for clean, their contributions per unit of `quiet` are nearly the
    same at all steps. If it does not, they are in proportion to 1 / lambda.
    Half of the draws suit the first and half the second; neither then varies without limit.

    Args:
        quiet: [T] share of each step times its chance to mask nothing.
        rate: [T] lambda.
    """
    tiny = torch.finfo(rate.dtype).tiny
    steep = quiet / rate.clamp(min=tiny)  # a step may mask nothing
    return 0.5 * (quiet / quiet.sum().clamp(min=tiny) + steep / steep.sum().clamp(min=tiny))


def _drawn(chances: Tensor, v: Tensor) -> Tensor:
    """Return the steps [...] that shares v of all `chances` [T] fall on."""
    running = chances.cumsum(0)
    at = torch.searchsorted(running / running[-1], v.contiguous(), right=True)
    return at.clamp(max=len(chances) - 1)
