"""Makers of noise: the ways to choose how many positions of a block are corrupted.

A maker is registered under the name that `diffusion.noise.draw` uses; `step` is for families of
discrete time. Estimators may bring makers of their own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import (
    Noise,
    NoiseUniforms,
    noise_by_count,
    noise_by_step,
    noise_by_time,
)

Rates = tuple[float, float]
"""Smallest and largest mask rate."""

ALL_RATES: Rates = (0.0, 1.0)


class NoiseMaker(ABC):
    """A way to draw the noise of a batch."""

    @abstractmethod
    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make the noise of B rows; see `draw_noise`."""


@dataclass(frozen=True)
class ByCount(NoiseMaker):
    """A number of positions per block, uniform on those that `rates` allow."""

    rates: Rates = ALL_RATES

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise with the weight n / k."""
        blocks, dense = (
            family.blocks(uniforms.position.shape[1]),
            family.objective.scores_all_positions,
        )
        return noise_by_count(uniforms, blocks, scorable, self.rates, dense, exponents)


@dataclass(frozen=True)
class ByTime(NoiseMaker):
    """A time per block, uniform between those of the smallest and the largest rate."""

    rates: Rates = ALL_RATES

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise with the weight of continuous time."""
        blocks = family.blocks(uniforms.position.shape[1])
        return noise_by_time(family.schedule, uniforms, blocks, scorable, self.rates, exponents)


@dataclass(frozen=True)
class ByStep(NoiseMaker):
    """One of T grid points per block."""

    timesteps: int

    def __call__(
        self,
        family: Family,
        uniforms: NoiseUniforms,
        scorable: Tensor | None = None,
        exponents: Tensor | None = None,
    ) -> Noise:
        """Make noise with the weight of T steps."""
        blocks = family.blocks(uniforms.position.shape[1])
        return noise_by_step(family.schedule, self.timesteps, uniforms, blocks, scorable)


NOISE_MAKERS: dict[str, type[ByCount] | type[ByTime]] = {"count": ByCount, "time": ByTime}
"""Makers of continuous time, by the names that configs use."""


def training_maker(family: Family, draw: str, rates: Rates = ALL_RATES) -> NoiseMaker:
    """Return the maker that a family trains with.

    Args:
        family: the family; one of discrete time draws its own steps.
        draw: key of `NOISE_MAKERS`.
        rates: smallest and largest mask rate, in continuous time.
    """
    if family.timesteps is not None:
        return ByStep(family.timesteps)
    return NOISE_MAKERS[draw](rates)


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
        x0: [B, L] clean tokens, for noise that depends on them.
        uniforms: the randomness.
        by: what makes it.
        scorable: [B, L] bool, positions that may be corrupted; None: all.
    """
    return by(family, uniforms, scorable, family.process.rate_exponents(x0))
