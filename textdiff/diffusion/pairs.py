"""Noise of training: single masks, or pairs of complementary ones.

In one mask of a pair every position is masked that is not masked in the other. A row is read under
both, so that each of its tokens is predicted exactly once: an antithetic draw. Each mask alone
estimates the bound, and so does the mean of the two. By count k is uniform on 0..n, and then n - k
is, too; the weight is (n + 1) / k. By time the weight of the second follows from that of the first,
because its rate 1 - lambda has the density that lambda has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from textdiff.diffusion import NOISE_MAKERS
from textdiff.diffusion.noise import (
    ALL_RATES,
    NEVER,
    ByCount,
    ByStep,
    ByTime,
    Noise,
    NoiseMaker,
    NoiseUniforms,
    Rates,
)
from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family


@dataclass(frozen=True)
class CountPairs(NoiseMaker):
    """Masks of k and of n - k of a block's n positions (Fast-dLLM v2, arXiv:2509.26328).

    k is uniform on 0..n, or between mask rates.

    The rate that a network reads of the second is one minus the (k + 1)-th smallest uniform: the
    (n - k)-th smallest of one minus the uniforms, Beta(n - k, k + 1) as `ByCount` says.
    """

    rates: Rates = ALL_RATES

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise of 2 B rows, the second half of them the complements of the first."""
        blocks = family.blocks(uniforms.position.shape[1])
        from_zero = self.rates[0] == 0.0
        first = ByCount(self.rates, from_zero)(family, uniforms, scorable, exponents)
        ordered = blocks.split(first.u, NEVER).sort(-1).values  # [B, blocks, size]
        n = (ordered < 1.0).sum(-1)  # [B, blocks], as what follows
        k = blocks.split(first.corrupted, False).sum(-1)
        following = ordered.gather(-1, k.clamp(max=blocks.size - 1).unsqueeze(-1)).squeeze(-1)
        alpha = following.where(k < n, 1.0)
        weight = (n + int(from_zero)).to(torch.float64) / (n - k).clamp(min=1)
        return _with_complement(first, blocks.spread(alpha), blocks.spread(weight))


@dataclass(frozen=True)
class TimePairs(NoiseMaker):
    """Masks at rates lambda and 1 - lambda, lambda that of a time per block."""

    rates: Rates = ALL_RATES

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise of 2 B rows, the second half of them the complements of the first."""
        first = ByTime(self.rates)(family, uniforms, scorable, exponents)
        rate = 1.0 - first.alpha
        # The weight is 1 / lambda over the density of lambda. Where alpha is 0 nothing is left.
        weight = first.weight * rate / first.alpha.where(first.alpha > 0.0, 1.0)
        return _with_complement(first, rate, weight)


PAIR_MAKERS: dict[str, Callable[[Rates], NoiseMaker]] = {"count": CountPairs, "time": TimePairs}
"""Makers of complementary masks, by the names of those of single ones."""


def training_maker(
    family: Family, draw: str, rates: Rates = ALL_RATES, in_pairs: bool = False
) -> NoiseMaker:
    """Return the noise maker that a family trains with.

    Args:
        family: the family; one of discrete time draws its own steps.
        draw: key of `NOISE_MAKERS`.
        rates: smallest and largest mask rate, in continuous time.
        in_pairs: whether every row has two masks, each of which masks what the other leaves.
    """
    if family.timesteps is not None:
        return ByStep(family.timesteps)
    return (PAIR_MAKERS if in_pairs else NOISE_MAKERS)[draw](rates)


def _with_complement(first: Noise, alpha: Tensor, weight: Tensor) -> Noise:
    """Return the noise of B rows, and B more that mask what it leaves.

    Args:
        first: the noise.
        alpha: [B, L] survival probabilities of the complement.
        weight: [B, L] weights of its masked positions.
    """
    half = torch.full_like(first.u, 0.5)
    # A mask of its own: uniforms from one minus these would decide ties otherwise.
    u = torch.where(first.corrupted, 0.75, 0.25).to(first.u.dtype).where(first.scorable, NEVER)
    second = Noise(alpha, half, u, weight)
    both = [
        torch.cat([getattr(noise, name).expand(half.shape) for noise in (first, second)])
        for name in ("alpha", "threshold", "u", "weight")
    ]
    return Noise(*both)
