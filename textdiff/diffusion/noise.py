"""The noise of a batch: one frozen bundle, and the makers that choose what is corrupted.

Drawn by count the masked bound has the finite weight n / k and needs no cut-off in time (Eq. 3.8,
arXiv:2406.03736). Drawn by time its variance grows without limit as the cut-off vanishes. The
weight of every maker is that of the masked bound, the density of d lambda / lambda with lambda = 1
- alpha. Objectives of other processes rescale it.

Positions may have rate exponents: with exponent w a position is corrupted by the level lambda with
probability lambda ** w. That is u ** (1 / w) in place of u, the level at which it is corrupted. The
bound integrates over d lambda / lambda as before, and both ways of drawing keep their variance:

- By time the rate that is drawn is the block's mean one, from which the level follows. If all
  exponents are the same, the two are equivalent.
- By count the first k positions are corrupted, and the weight is n over the sum of *their*
  exponents. A random one of n positions is the last of those at a level of density w lambda ** (w -
  1), so that level and positions have the density of independent ones times sum(w) / (n lambda).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.family import Blocks, Family


Rates = tuple[float, float]
"""Smallest and largest mask rate."""

ALL_RATES: Rates = (0.0, 1.0)


@dataclass(frozen=True)
class _Bundle:
    """Tensors, some of which may be absent."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every field that is present."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{name: function(v) for name, v in values.items() if v is not None})


@dataclass(frozen=True)
class Noise(_Bundle):
    """Noise of [B, L] positions; every field is float64 and has (or broadcasts to) that shape.

    Attributes:
        alpha: survival probability that the network and the process read.
        threshold: a position is corrupted if and only if `u < threshold`.
        u: uniform of each position; out of range where a position is not scored.
        weight: weight of each position in the negative ELBO of a masked process.
        u_token: uniform that decides what a corrupted position becomes, for noise that replaces
            tokens.
        alpha_s: survival probability one grid step earlier, in discrete time.
    """

    alpha: Tensor
    threshold: Tensor
    u: Tensor
    weight: Tensor
    u_token: Tensor | None = None
    alpha_s: Tensor | None = None

    @property
    def corrupted(self) -> Tensor:
        """[B, L] bool: positions whose token does not survive."""
        return self.u < self.threshold

    @property
    def scorable(self) -> Tensor:
        """[B, L] bool: positions that may be corrupted."""
        return self.u < 1.0

    def at(self, positions: Tensor) -> Noise:
        """Return the noise of flat positions, [N] into B * L."""
        shape = self.u.shape
        return self.map(lambda value: value.expand(shape).reshape(-1)[positions])


@dataclass(frozen=True)
class NoiseUniforms(_Bundle):
    """The uniforms that one draw of noise takes, float64.

    Attributes:
        level: [B, blocks] places each block's count, time or step (stratify them).
        position: [B, L] decides which positions are corrupted.
        token: [B, L] decides what they become, for noise that replaces tokens; else None.
    """

    level: Tensor
    position: Tensor
    token: Tensor | None = None


class NoiseMaker(ABC):
    """A way to choose the corrupted positions of each block."""

    @abstractmethod
    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make the noise of B rows.

        Args:
            family: its schedule, its blocks, and which positions its objective scores.
            uniforms: the randomness.
            scorable: [B, L] bool, the positions that may be corrupted; None: all.
            exponents: [B, L] rate exponents; None: 1 everywhere.
        """


NEVER = 2.0
"""Stands in place of a uniform, which never reaches it, at positions that are never corrupted."""


def _levels(u: Tensor, exponents: Tensor | None, scorable: Tensor | None) -> Tensor:
    """Return [B, L] the level at which each position is corrupted; out of range: never."""
    levels = u if exponents is None else u ** (1.0 / exponents)
    return levels if scorable is None else levels.masked_fill(~scorable, NEVER)


_NEWTON = 16  # steps; the iteration below is exact to float64 after about eight


def _level(
    rate: Tensor, exponents: Tensor, blocks: Blocks, scorable: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return [B, blocks] levels of given mean rates, and d ln rate / d ln level.

    The log of the mean of lambda ** w is convex in ln lambda: Newton's iteration from above falls
    to the root.

    Args:
        rate: [B, blocks] in (0, 1].
        exponents: [B, L] rate exponents.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be corrupted; None: all.
    """
    real = torch.ones_like(exponents, dtype=torch.bool) if scorable is None else scorable
    real = blocks.split(real, False)  # [B, blocks, size]
    real = real | ~real.any(-1, keepdim=True)  # a block without any: its level does not matter
    powers = blocks.split(exponents, 1.0)  # [B, blocks, size]
    target = (rate * real.sum(-1)).log()
    level = rate.log() / powers.where(real, 0.0).amax(-1)
    for _ in range(_NEWTON):
        logs = (powers * level.unsqueeze(-1)).where(real, -torch.inf)
        slope = (powers * logs.softmax(-1)).sum(-1)
        level = (level - (logs.logsumexp(-1) - target) / slope).clamp(max=0.0)
    return level.exp(), slope


def counts(n: Tensor, rates: Rates, from_zero: bool) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest count, float64, that mask rates allow of n positions.

    They are the whole numbers in [rates[0] n, rates[1] n], at least 1 (0 with `from_zero`); where
    there is none, the first one above.
    """
    # The slack keeps ends such as 0.07 * 100 whole.
    smallest = torch.ceil(rates[0] * n.to(torch.float64) - 1e-9).clamp(min=0 if from_zero else 1)
    largest = torch.floor(rates[1] * n.to(torch.float64) + 1e-9)
    return smallest, torch.maximum(largest, smallest)


@dataclass(frozen=True)
class ByCount(NoiseMaker):
    """A count k of a block's n positions, uniform on 1..n or between mask rates; weight n / k.

    The mask rate that a network reads is the k-th smallest uniform. It is Beta(k, n - k + 1), as
    the time-conditioned bound needs, and independent of *which* positions are corrupted.

    Where the objective scores all positions, it also does where none is corrupted: k is uniform on
    0..n. Given k > 0, the density of rate and positions is lambda^(k-1) (1 - lambda)^(n-k) k / (n +
    1). Independent ones at a uniform rate have lambda^k (1 - lambda)^(n-k): the weight (n + 1) / k
    makes up for it, up to the factor lambda that every weight here is short of. Given k = 0 the
    rate is Beta(1, n + 1) and the weight 1 / lambda.
    """

    rates: Rates = ALL_RATES
    from_zero: bool = False  # whether counts start at 0 whatever the objective scores

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise whose order of uniforms within a block decides what is corrupted."""
        blocks = family.blocks(uniforms.position.shape[1])
        from_zero = self.from_zero or family.objective.scores_all_positions
        u = _levels(uniforms.position, exponents, scorable)
        ordered = blocks.split(u, NEVER).sort(-1).values  # [B, blocks, size]
        n = (ordered < 1.0).sum(-1)  # [B, blocks], as what follows
        smallest, largest = counts(n, self.rates, from_zero)
        k = smallest + torch.floor(uniforms.level * (largest - smallest + 1))
        k = k.to(torch.int64).clamp(max=n)
        rate = ordered.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
        # The k-th smallest uniform itself is corrupted too: u < threshold must hold for it.
        threshold = torch.nextafter(rate, torch.ones_like(rate)).masked_fill(k == 0, 0.0)
        weight = (n + (1 if from_zero else 0)).to(torch.float64) / k.clamp(min=1)
        if exponents is not None:
            corrupted = u < blocks.spread(threshold)
            weight = n / blocks.split(exponents * corrupted, 0.0).sum(-1).where(k > 0, 1.0)
        if from_zero:
            # The smallest of n uniforms, spread again to that of n + 1.
            power = n / (n + 1.0)
            least = -torch.expm1(power * torch.log1p(-rate.clamp(max=1.0)))
            rate = rate.where(k > 0, least)
            weight = weight.where(k > 0, 1.0 / rate)
        rate, weight = (x.masked_fill(n == 0, 0.0) for x in (rate, weight))
        alpha, threshold, weight = (blocks.spread(x) for x in (1.0 - rate, threshold, weight))
        return Noise(alpha, threshold, u, weight, uniforms.token)


@dataclass(frozen=True)
class ByTime(NoiseMaker):
    """A time per block, uniform between those of two mask rates; positions are independent."""

    rates: Rates = ALL_RATES

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise with the weight of continuous time, -alpha' / (1 - alpha)."""
        blocks, schedule = family.blocks(uniforms.position.shape[1]), family.schedule
        ends = torch.tensor([1.0 - rate for rate in self.rates], dtype=torch.float64)
        # Clamped: a schedule whose ends are not ideal reaches rates 0 and 1 later, or never.
        low, high = schedule.t_of_alpha(ends).clamp(0.0, 1.0)
        t = low + (high - low) * uniforms.level  # [B, blocks], as what follows
        alpha, weight = schedule.alpha(t), schedule.elbo_weight(t)
        level = 1.0 - alpha
        if exponents is not None:
            level, slope = _level(level, exponents, blocks, scorable)
            alpha, weight = 1.0 - level, weight / slope
        alpha, level, weight = (blocks.spread(x) for x in (alpha, level, weight))
        u = _levels(uniforms.position, exponents, scorable)
        return Noise(alpha, level, u, weight, uniforms.token)


@dataclass(frozen=True)
class ByStep(NoiseMaker):
    """One of T grid points per block: t = i / T, i uniform on 1..T; positions are independent."""

    timesteps: int

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise with the weight of the masked bound of T steps.

        It is T (alpha_s - alpha_t) / (1 - alpha_t) with s = t - 1/T (Eq. 8, arXiv:2406.07524).
        """
        blocks, schedule = family.blocks(uniforms.position.shape[1]), family.schedule
        steps = self.timesteps
        step = torch.floor(uniforms.level * steps).clamp(max=steps - 1)  # [B, blocks]
        alpha_s, alpha = schedule.alpha(step / steps), schedule.alpha((step + 1) / steps)
        weight = steps * (alpha_s - alpha) / (1.0 - alpha)
        u = _levels(uniforms.position, None, scorable)
        alpha, weight, alpha_s = (blocks.spread(x) for x in (alpha, weight, alpha_s))
        return Noise(alpha, 1.0 - alpha, u, weight, uniforms.token, alpha_s)


def draw_noise(
    family: Family,
    x0: Tensor,
    uniforms: NoiseUniforms,
    by: NoiseMaker,
    scorable: Tensor | None = None,
) -> Noise:
    """Draw the noise of a batch.

    Args:
        family: process, schedule, objective and block size.
        x0: [B, L] clean tokens, which rate exponents depend on.
        uniforms: the randomness.
        by: what makes the noise.
        scorable: [B, L] bool, positions that may be corrupted; None: all.
    """
    return by(family, uniforms, scorable, family.process.rate_exponents(x0))
