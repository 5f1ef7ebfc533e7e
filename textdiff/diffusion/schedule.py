"""Noise schedules: alpha(t), the probability that a token survives until time t.

Time runs from 0 (clean) to 1 (noise); alpha falls. Everything is float64. Two ends are not ideal
for some schedules (`loglinear` with eps > 0, `geometric`): what an estimator in t then misses is
for the estimator to say, not for the schedule to hide.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


class NoiseSchedule(ABC):
    """A differentiable, strictly falling alpha(t)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Survival probability at time t, any shape."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha with respect to t (negative)."""

    @abstractmethod
    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        """The time at which alpha is reached."""

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise sigma = -log alpha, what networks that see the noise level are fed."""
        return -torch.log(self.alpha(t))

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)): weight of the masked bound (Eq. 10, arXiv:2406.07524)."""
        return -self.dalpha(t) / (1.0 - self.alpha(t))

    @property
    def ideal(self) -> bool:
        """Whether alpha is exactly 1 at t = 0 and exactly 0 at t = 1."""
        ends = self.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
        return bool(ends[0] == 1.0) and bool(ends[1].abs() < 1e-15)


@dataclass(frozen=True)
class LogLinear(NoiseSchedule):
    """alpha = 1 - (1 - eps) t: linear for eps = 0 (Sec. 5.1, arXiv:2310.16834)."""

    eps: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps - 1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1.0 - alpha) / (1.0 - self.eps)


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """alpha = 1 - cos(pi (1 - t) / 2) (Table 1, arXiv:2406.04329)."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - torch.sin(0.5 * math.pi * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return torch.asin(1.0 - alpha) * (2.0 / math.pi)


@dataclass(frozen=True)
class Polynomial(NoiseSchedule):
    """alpha = 1 - t ** exponent (Table 1, arXiv:2406.04329)."""

    exponent: float = 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t**self.exponent

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.exponent * t ** (self.exponent - 1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1.0 - alpha) ** (1.0 / self.exponent)


@dataclass(frozen=True)
class Geometric(NoiseSchedule):
    """sigma = sigma_min ** (1 - t) * sigma_max ** t (Sec. 5.1, arXiv:2310.16834)."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1.0 - t) * self.sigma_max**t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.sigma(t))

    def dalpha(self, t: Tensor) -> Tensor:
        rate = math.log(self.sigma_max / self.sigma_min)
        return -self.sigma(t) * rate * self.alpha(t)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        rate = math.log(self.sigma_max / self.sigma_min)
        return torch.log(-torch.log(alpha) / self.sigma_min) / rate

    def elbo_weight(self, t: Tensor) -> Tensor:
        # 1 - alpha by expm1: alpha is within 1e-4 of one near t = 0.
        return -self.dalpha(t) / -torch.expm1(-self.sigma(t))


@dataclass(frozen=True)
class Hybrid(NoiseSchedule):
    """The schedule of hybrid noise (Eq. 5 and 9, arXiv:2503.04482, with gamma = 1).

    alpha = (1 - t) / (1 + c), the mask has t / (1 + c) and all tokens together c / (1 + c), where
    c = B sqrt(t (1 - t)) and B = 2 p / (1 - p).

    Attributes:
        uniform: p, the largest share of uniform noise, reached at t = 1/2; 0 is the linear
            schedule of absorbing noise.
    """

    uniform: float = 0.1

    @property
    def scale(self) -> float:
        """B."""
        return 2.0 * self.uniform / (1.0 - self.uniform)

    def uniform_mass(self, t: Tensor) -> Tensor:
        """c(t)."""
        return self.scale * (t * (1.0 - t)).clamp(min=0.0).sqrt()

    def uniform_mass_slope(self, t: Tensor) -> Tensor:
        """c'(t)."""
        return self.scale * (0.5 - t) / (t * (1.0 - t)).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + self.uniform_mass(t))

    def dalpha(self, t: Tensor) -> Tensor:
        c = self.uniform_mass(t)
        # (1 - t) c'(t), finite at t = 1 where c' is not.
        slope = self.scale * (0.5 - t) * ((1.0 - t) / t).sqrt() if self.uniform else 0.0 * t
        return -(1.0 + c + slope) / (1.0 + c).square()

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        # Squaring alpha c = 1 - t - alpha gives a quadratic in t; this form of its smaller root
        # does not cancel near t = 0.
        loss = 1.0 - alpha
        a = (alpha * self.scale).square()
        root = (a * (a + 4.0 * alpha * loss)).sqrt()
        return 2.0 * loss.square() / (2.0 * loss + a + root).clamp(min=1e-300)


@dataclass(frozen=True)
class Learned(NoiseSchedule):
    """alpha_v = 1 - t ** w_v: one exponent per token, learned (Sec. 6, arXiv:2406.04329).

    As a schedule of its own it is the clock 1 - t that all tokens read, which is what networks that
    see the noise level are told; how fast each token goes by that clock is for the process to say.

    Attributes:
        exponent: w of every token before training.
        exponents: [V] values of all w, or the module that computes them; None: still `exponent`.
    """

    exponent: float = 1.0
    exponents: nn.Module | Tensor | None = None

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return 1.0 - alpha

    def token_exponents(self, rows: int) -> Tensor:
        """[V] float64 exponents of `rows` tokens as they are now, with gradient where learned."""
        if self.exponents is None:
            return torch.full((rows,), self.exponent, dtype=torch.float64)
        if isinstance(self.exponents, Tensor):
            return self.exponents
        paces: Tensor = self.exponents().double()
        return paces

    def to(self, device: torch.device) -> "Learned":
        """A copy on another device, of the exponents as they are now."""
        if self.exponents is None:
            return self
        with torch.no_grad():
            return replace(self, exponents=self.token_exponents(0).to(device))


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "loglinear": LogLinear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "geometric": Geometric,
    "hybrid": Hybrid,
    "learned": Learned,
}


def build_schedule(kind: str, **options: Any) -> NoiseSchedule:
    """The schedule that a config's `diffusion.schedule` names."""
    return SCHEDULES[kind](**options)
