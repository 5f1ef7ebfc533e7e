"""The noise of a batch: one frozen bundle, two makers.

*By time*: a time per block; a position is hit with probability 1 - alpha(t). *By count*: how many
positions of a block are hit, uniform on 1..n, which ones by a random order. Drawn by count the
masked bound has the finite weight n / k and needs no cut-off in time (Eq. 3.8, arXiv:2406.03736);
drawn by time its variance grows without limit as the cut-off vanishes.
"""

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
        u: uniform of each position.
        weight: weight of each position in the negative ELBO.
    """

    alpha: Tensor
    threshold: Tensor
    u: Tensor
    weight: Tensor

    @property
    def hit(self) -> Tensor:
        """[B, L] bool: the positions that lose their token."""
        return self.u < self.threshold

    def at(self, positions: Tensor) -> "Noise":
        """The noise of flat positions, [N] into B * L."""
        shape = self.u.shape
        values = (getattr(self, field.name) for field in fields(self))
        return Noise(*(v.expand(shape).reshape(-1)[positions] for v in values))


# A uniform never reaches this, so a position that holds it is never hit.
_NEVER = 2.0


def noise_by_time(
    schedule: NoiseSchedule,
    v: Tensor,
    u: Tensor,
    blocks: Blocks,
    scorable: Tensor | None = None,
    rates: tuple[float, float] = (0.0, 1.0),
) -> Noise:
    """Noise at one time per block: lambda = 1 - alpha(t), hits are independent.

    Args:
        schedule: gives alpha and the weight -alpha' / (1 - alpha).
        v: [B, blocks] uniforms that place the time (stratify them).
        u: [B, L] uniforms of the positions.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all.
        rates: smallest and largest mask rate; times are uniform in between.
    """
    ends = torch.tensor([1.0 - rate for rate in rates], dtype=torch.float64)
    # Clamped: a schedule whose ends are not ideal reaches rates 0 and 1 outside its time, or never.
    low, high = schedule.t_of_alpha(ends).clamp(0.0, 1.0)
    t = low + (high - low) * v
    alpha = blocks.spread(schedule.alpha(t))
    u = u if scorable is None else u.masked_fill(~scorable, _NEVER)
    return Noise(alpha, 1.0 - alpha, u, blocks.spread(schedule.elbo_weight(t)))


def noise_by_count(
    v: Tensor,
    u: Tensor,
    blocks: Blocks,
    scorable: Tensor | None = None,
    rates: tuple[float, float] = (0.0, 1.0),
) -> Noise:
    """Noise that hits exactly k of a block's n positions, k uniform on 1..n, weight n / k.

    The mask rate that a network sees is the k-th smallest uniform, which is Beta(k, n - k + 1) as
    the time-conditioned bound needs, and independent of *which* positions are hit.

    Args:
        v: [B, blocks] uniforms that place the count (stratify them).
        u: [B, L] uniforms whose order within a block decides which positions are hit.
        blocks: how L falls into blocks.
        scorable: [B, L] bool, the positions that may be hit; None: all. A block without any is
            not hit.
        rates: counts are uniform on the whole numbers in [rates[0] n, rates[1] n], at least 1.
    """
    u = u if scorable is None else u.masked_fill(~scorable, _NEVER)
    ordered = blocks.split(u, _NEVER).sort(-1).values
    n = (ordered < 1.0).sum(-1)
    # The slack keeps ends such as 0.07 * 100 whole.
    smallest = torch.ceil(rates[0] * n.to(torch.float64) - 1e-9).clamp(min=1)
    largest = torch.maximum(torch.floor(rates[1] * n.to(torch.float64) + 1e-9), smallest)
    k = (smallest + torch.floor(v * (largest - smallest + 1))).to(torch.int64).clamp(max=n)
    rate = ordered.gather(-1, (k - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    empty = n == 0
    rate = rate.masked_fill(empty, 0.0)
    weight = n.to(torch.float64) / k.clamp(min=1)
    # The k-th smallest uniform itself is hit too: u < threshold must hold for it.
    threshold = torch.nextafter(rate, torch.ones_like(rate)).masked_fill(empty, 0.0)
    return Noise(blocks.spread(1.0 - rate), blocks.spread(threshold), u, blocks.spread(weight))
