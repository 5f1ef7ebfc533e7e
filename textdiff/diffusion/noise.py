"""The noise of a batch: one frozen bundle, three makers.

*By time*: a time per block; a position is hit with probability 1 - alpha(t). *By step*: likewise,
the time being one of T grid points. *By count*: how many positions of a block are hit, uniform on
1..n, which ones by a random order. Drawn by count the masked bound has the finite weight n / k and
needs no cut-off in time (Eq. 3.8, arXiv:2406.03736); drawn by time its variance grows without limit
as the cut-off vanishes. Uniform and hybrid noise pay at positions that are not hit as well, and
also where none is: their counts start at 0.

The weight of every maker is that of the masked bound, the density of d lambda / lambda with lambda
= 1 - alpha; objectives of other processes rescale it.

Positions may go at different paces: one of pace w is lost by the level lambda with probability
lambda ** w. That is u ** (1 / w) in place of u, the level at which its token goes. The bound
integrates over d lambda / lambda as before, and both ways of drawing keep their variance:

- By time the rate that is drawn is the block's mean one, of which the level follows. If all paces
  are the same, it does not matter which.
- By count the k positions that go first are hit, and the weight is n over the sum of *their* paces.
  A random one of n positions goes last of those at a level of density w lambda ** (w - 1), so that
  level and hits have the density of independent hits times sum(w) / (n lambda).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Noise:
    """Noise of [B, L] positions; every field is float64 and has (or broadcasts to) that shape.

    Attributes:
        alpha: survival probability that the network and the process see.
        threshold: a position is hit if and only if `u < threshold`.
        u: uniform of each position; out of range where a position is not scored.
        weight: weight of each position in the negative ELBO of a masked process.
        u_token: uniform that decides what a hit position becomes, for processes that draw tokens.
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
        """[B, L] bool: the positions that lose their token."""
        return self.u < self.threshold

    @property
    def scorable(self) -> Tensor:
        """[B, L] bool: the positions that may be hit."""
        return self.u < 1.0

    def map(self, function: Callable[[Tensor], Tensor]) -> "Noise":
        """The bundle with a function applied to every field that is there."""
        there = {f.name: getattr(self, f.name) for f in fields(self)}
        return Noise(**{name: function(v) for name, v in there.items() if v is not None})

    def at(self, positions: Tensor) -> "Noise":
        """The noise of flat positions, [N] into B * L."""
        shape = self.u.shape
        return self.map(lambda value: value.expand(shape).reshape(-1)[positions])


@dataclass(frozen=True)
class NoiseUniforms:
    """The uniforms that one draw of noise takes, float64.

    Attributes:
        level: [B, blocks] places each block's count, time or step (stratify them).
        position: [B, L] decides which positions are corrupted.
        token: [B, L] decides what they become, for processes that draw tokens; else None.
    """

    level: Tensor
    position: Tensor
    token: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "NoiseUniforms":
        """Apply a function to every field that is present."""
        token = None if self.token is None else function(self.token)
        return NoiseUniforms(function(self.level), function(self.position), token)


# A uniform never reaches this, so a position that holds it is never corrupted.
_NEVER = 2.0


def _levels(u: Tensor, pace: Tensor | None, scorable: Tensor | None) -> Tensor:
    """[B, L] the level lambda at which each position goes, by its uniform; out of range: never."""
    levels = u if pace is None else u ** (1.0 / pace)
    return levels if scorable is None else levels.masked_fill(~scorable, _NEVER)


_NEWTON = 16  # steps; the iteration below is exact to float64 after about eight


def _level(
    rate: Tensor, pace: Tensor, blocks: Blocks, scorable: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The level at which a block has lost a given mean rate, and d ln rate / d ln level.

    The log of the mean of lambda ** w is convex in ln lambda: Newton's iteration from above falls
    to the root.

    Args:
        rate: [B, blocks] in (0, 1].
        pace: [B, L] pace of each position.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all.
    """
    real = torch.ones_like(pace, dtype=torch.bool) if scorable is None else scorable
    real = blocks.split(real, False)
    real = real | ~real.any(-1, keepdim=True)  # a block without any: its level does not matter
    paces = blocks.split(pace, 1.0)
    target = (rate * real.sum(-1)).log()
    level = rate.log() / paces.where(real, 0.0).amax(-1)
    for _ in range(_NEWTON):
        logs = (paces * level.unsqueeze(-1)).where(real, -torch.inf)
        slope = (paces * logs.softmax(-1)).sum(-1)
        level = (level - (logs.logsumexp(-1) - target) / slope).clamp(max=0.0)
    return level.exp(), slope


def noise_by_time(
    schedule: NoiseSchedule,
    uniforms: NoiseUniforms,
    blocks: Blocks,
    scorable: Tensor | None = None,
    rates: tuple[float, float] = (0.0, 1.0),
    pace: Tensor | None = None,
) -> Noise:
    """Noise at one time per block: lambda = 1 - alpha(t), hits are independent.

    Args:
        schedule: gives alpha and the weight -alpha' / (1 - alpha).
        uniforms: their levels place the time.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all.
        rates: smallest and largest mask rate; times are uniform in between.
        pace: [B, L] pace of each position; None: 1 everywhere.
    """
    ends = torch.tensor([1.0 - rate for rate in rates], dtype=torch.float64)
    # Clamped: a schedule whose ends are not ideal reaches rates 0 and 1 outside its time, or never.
    low, high = schedule.t_of_alpha(ends).clamp(0.0, 1.0)
    t = low + (high - low) * uniforms.level
    alpha, weight = schedule.alpha(t), schedule.elbo_weight(t)
    level = 1.0 - alpha
    if pace is not None:
        level, slope = _level(level, pace, blocks, scorable)
        alpha, weight = 1.0 - level, weight / slope
    alpha, level, weight = (blocks.spread(x) for x in (alpha, level, weight))
    place = _levels(uniforms.position, pace, scorable)
    return Noise(alpha, level, place, weight, uniforms.token)


def noise_by_step(
    schedule: NoiseSchedule,
    timesteps: int,
    uniforms: NoiseUniforms,
    blocks: Blocks,
    scorable: Tensor | None = None,
) -> Noise:
    """Noise at one of T grid points per block: t = i / T, i uniform on 1..T.

    The weight is that of the masked bound of a T-step process, T (alpha_s - alpha_t) / (1 -
    alpha_t) with s = t - 1/T (Eq. 8, arXiv:2406.07524).

    Args:
        schedule: gives alpha.
        timesteps: T.
        uniforms: their levels place the step.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all.
    """
    step = torch.floor(uniforms.level * timesteps).clamp(max=timesteps - 1)
    alpha_s, alpha = schedule.alpha(step / timesteps), schedule.alpha((step + 1) / timesteps)
    weight = timesteps * (alpha_s - alpha) / (1.0 - alpha)
    place = _levels(uniforms.position, None, scorable)
    alpha, weight, alpha_s = (blocks.spread(x) for x in (alpha, weight, alpha_s))
    return Noise(alpha, 1.0 - alpha, place, weight, uniforms.token, alpha_s)


def counts(n: Tensor, rates: tuple[float, float], dense: bool) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of hits, float64, that mask rates leave to n positions.

    They are the whole numbers in [rates[0] n, rates[1] n], at least 1 (0 with `dense`); where there
    is none, the first one above.
    """
    # The slack keeps ends such as 0.07 * 100 whole.
    smallest = torch.ceil(rates[0] * n.to(torch.float64) - 1e-9).clamp(min=0 if dense else 1)
    largest = torch.floor(rates[1] * n.to(torch.float64) + 1e-9)
    return smallest, torch.maximum(largest, smallest)


def noise_by_count(
    uniforms: NoiseUniforms,
    blocks: Blocks,
    scorable: Tensor | None = None,
    rates: tuple[float, float] = (0.0, 1.0),
    dense: bool = False,
    pace: Tensor | None = None,
) -> Noise:
    """Noise that hits exactly k of a block's n positions, k uniform on 1..n, weight n / k.

    The mask rate that a network sees is the k-th smallest uniform, which is Beta(k, n - k + 1) as
    the time-conditioned bound needs, and independent of *which* positions are hit.

    With `dense`, k is uniform on 0..n. Given k > 0, rate and positions have the density
    lambda^(k-1) (1 - lambda)^(n-k) k / (n + 1) where independent hits at a uniform rate have
    lambda^k (1 - lambda)^(n-k): the weight (n + 1) / k makes up for it, up to the factor lambda
    that every weight here is short of. Given k = 0 the rate is Beta(1, n + 1) and the weight 1 /
    lambda.

    Args:
        uniforms: their levels place the count; the order of the positions' uniforms within a block
            decides which are hit.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all. A block without any is
            not hit.
        rates: counts are uniform on those that `counts` leaves.
        dense: whether positions that are not hit cost nats too.
        pace: [B, L] pace of each position, not with `dense`; None: 1 everywhere.
    """
    u = _levels(uniforms.position, pace, scorable)
    ordered = blocks.split(u, _NEVER).sort(-1).values
    n = (ordered < 1.0).sum(-1)
    smallest, largest = counts(n, rates, dense)
    k = (
        (smallest + torch.floor(uniforms.level * (largest - smallest + 1)))
        .to(torch.int64)
        .clamp(max=n)
    )
    rate = ordered.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # The k-th smallest uniform itself is hit too: u < threshold must hold for it.
    threshold = torch.nextafter(rate, torch.ones_like(rate)).masked_fill(k == 0, 0.0)
    weight = (n + (1 if dense else 0)).to(torch.float64) / k.clamp(min=1)
    if pace is not None:
        hit = u < blocks.spread(threshold)
        weight = n / blocks.split(pace * hit, 0.0).sum(-1).where(k > 0, 1.0)
    if dense:
        # The smallest of n uniforms, spread again to that of n + 1.
        power = n / (n + 1.0)
        least = -torch.expm1(power * torch.log1p(-rate.clamp(max=1.0)))
        rate = rate.where(k > 0, least)
        weight = weight.where(k > 0, 1.0 / rate)
    empty = n == 0
    rate, weight = rate.masked_fill(empty, 0.0), weight.masked_fill(empty, 0.0)
    alpha = blocks.spread(1.0 - rate)
    return Noise(alpha, blocks.spread(threshold), u, blocks.spread(weight), uniforms.token)
