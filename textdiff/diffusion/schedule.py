"""Noise schedules: alpha(t), the probability that a token survives until time t.

Time runs from 0 (clean) to 1 (noise); alpha falls. Everything is float64. Two ends are not ideal
for some schedules (`loglinear` with eps > 0, `geometric`): what an estimator in t then misses is
for the estimator to say, not for the schedule to hide.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, model_validator

from textdiff.section import Number, Section, Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion import DiffusionConfig
    from textdiff.diffusion.objectives.objective import Objective


class NoiseSchedule(Section):
    """A differentiable, strictly falling alpha(t).

    Attributes:
        processes: names of the forward processes that the schedule goes with.
        reason: why it goes with no other.
    """

    kind: str

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "uniform")
    reason: ClassVar[str] = (
        "the hybrid process and the hybrid schedule need each other, because the share of uniform "
        "noise and the noise level are one function of time"
    )

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the survival probability at time t, any shape."""

    @abstractmethod
    def dalpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t (negative)."""

    @abstractmethod
    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        """Return the time at which alpha is reached."""

    def sigma(self, t: Tensor) -> Tensor:
        """Return total noise sigma = -log alpha, which networks with time conditioning read."""
        return -torch.log(self.alpha(t))

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Return the masked bound's weight, -alpha'(t) / (1 - alpha(t)).

        This is Eq. 10, arXiv:2406.07524.
        """
        return -self.dalpha(t) / (1.0 - self.alpha(t))

    @property
    def learned(self) -> torch.nn.Module | None:
        """Module that training learns besides the network; None: nothing."""
        return None

    def with_exponents(self, exponents: torch.nn.Module | None) -> NoiseSchedule:
        """Return the schedule with the module that holds its parameters, if it has any."""
        return self

    def misfit(self, process: str, objective: Objective) -> str | None:
        """Return why the schedule does not go with a process and an objective; None: it does."""
        if process in self.processes:
            return None
        return (
            f"schedule {self.kind} does not go with process {process} ({self.reason}); set another "
            f"schedule, or process: {' or '.join(self.processes)}"
        )

    def refusal(self, choices: DiffusionConfig) -> str | None:
        """Return why the schedule does not go with the other choices; None: it does."""
        return self.misfit(choices.process, choices.objective)


class LogLinear(NoiseSchedule):
    """alpha(t) = 1 - (1 - eps) t; eps = 0 is the linear schedule.

    Sec. 5.1, arXiv:2310.16834.
    """

    kind: Literal["loglinear"] = "loglinear"
    eps: Number = Field(0.0, ge=0.0, lt=1.0, description="survival probability left at t = 1")

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.eps) * t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.eps - 1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1.0 - alpha) / (1.0 - self.eps)


class Cosine(NoiseSchedule):
    """alpha(t) = 1 - cos(pi (1 - t) / 2).

    Table 1, arXiv:2406.04329.
    """

    kind: Literal["cosine"] = "cosine"

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - torch.sin(0.5 * math.pi * t)

    def dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return torch.asin(1.0 - alpha) * (2.0 / math.pi)


class Polynomial(NoiseSchedule):
    """alpha(t) = 1 - t ** exponent.

    Table 1, arXiv:2406.04329.
    """

    kind: Literal["polynomial"] = "polynomial"
    exponent: Number = Field(2.0, gt=0.0, description="power of t")

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t**self.exponent

    def dalpha(self, t: Tensor) -> Tensor:
        return -self.exponent * t ** (self.exponent - 1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return (1.0 - alpha) ** (1.0 / self.exponent)


class Geometric(NoiseSchedule):
    """sigma(t) = sigma_min ** (1 - t) * sigma_max ** t, alpha = exp(-sigma).

    Sec. 5.1, arXiv:2310.16834.
    """

    kind: Literal["geometric"] = "geometric"
    sigma_min: Number = Field(1e-4, gt=0.0, description="total noise at t = 0")
    sigma_max: Number = Field(20.0, gt=0.0, description="total noise at t = 1")

    @model_validator(mode="after")
    def _ordered(self) -> Geometric:
        if self.sigma_min >= self.sigma_max:
            raise ValueError("sigma_min must be smaller than sigma_max")
        return self

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


class HybridSchedule(NoiseSchedule):
    """The schedule of hybrid noise (arXiv:2503.04482).

    alpha = (1 - t) / (1 + c), the mask has t / (1 + c) and all tokens together c / (1 + c). Here c
    = B sqrt(t (1 - t)) and B = 2 p / (1 - p) (Eq. 5 and 9 there, with gamma = 1).
    """

    kind: Literal["hybrid"] = "hybrid"
    uniform: Number = Field(
        0.1, gt=0.0, lt=1.0, description="largest share of uniform noise, at t = 1/2"
    )

    processes = ("hybrid",)

    @property
    def scale(self) -> float:
        """B."""
        return 2.0 * self.uniform / (1.0 - self.uniform)

    def uniform_mass(self, t: Tensor) -> Tensor:
        """Return c(t)."""
        return self.scale * (t * (1.0 - t)).clamp(min=0.0).sqrt()

    def uniform_mass_slope(self, t: Tensor) -> Tensor:
        """Return c'(t)."""
        return self.scale * (0.5 - t) / (t * (1.0 - t)).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + self.uniform_mass(t))

    def dalpha(self, t: Tensor) -> Tensor:
        c = self.uniform_mass(t)
        # (1 - t) c'(t), finite at t = 1 where c' is not.
        slope = self.scale * (0.5 - t) * ((1.0 - t) / t).sqrt()
        return -(1.0 + c + slope) / (1.0 + c).square()

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        # Squaring alpha c = 1 - t - alpha gives a quadratic in t; this form of its smaller root
        # does not cancel near t = 0.
        loss = 1.0 - alpha
        a = (alpha * self.scale).square()
        root = (a * (a + 4.0 * alpha * loss)).sqrt()
        return 2.0 * loss.square() / (2.0 * loss + a + root).clamp(min=1e-300)


class Learned(NoiseSchedule):
    """alpha(t) = 1 - t ** w, one learned w per token (arXiv:2406.04329).

    By itself it is the noise level 1 - t that all tokens share (Sec. 6 there), which networks with
    time conditioning read. The process corrupts each token by its own exponent.
    """

    kind: Literal["learned"] = "learned"
    exponent: Number = Field(1.0, gt=0.0, description="w of every token before training")

    processes = ("absorbing",)
    reason = "its exponents say when tokens are masked"

    # A module, values [V] or None: all are `exponent`. pydantic evaluates the annotation.
    _exponents: Any = PrivateAttr(None)

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return 1.0 - alpha

    @property
    def learned(self) -> torch.nn.Module | None:
        return self._exponents if isinstance(self._exponents, torch.nn.Module) else None

    def with_exponents(self, exponents: torch.nn.Module | Tensor | None) -> Learned:
        copy = self.model_copy()
        copy._exponents = exponents
        return copy

    def token_exponents(self, rows: int) -> Tensor:
        """Return [V] float64 exponents of `rows` tokens, with gradient where learned."""
        module = self.learned
        values: Tensor | None = self._exponents if module is None else module().double()
        if values is None:
            return torch.full((rows,), self.exponent, dtype=torch.float64)
        return values

    def to(self, device: torch.device) -> Learned:
        """Return a copy on another device, of the exponents as they are now."""
        if self._exponents is None:
            return self
        with torch.no_grad():
            return self.with_exponents(self.token_exponents(0).to(device))

    def misfit(self, process: str, objective: Objective) -> str | None:
        problem = super().misfit(process, objective)
        if problem or (objective.learns_schedules and objective.trains_on_bound):
            return problem
        return (
            "a learned schedule is trained on the bound of masked diffusion: set "
            "objective: {kind: mdlm, loss_weight: elbo}"
        )

    def refusal(self, choices: DiffusionConfig) -> str | None:
        problem = super().refusal(choices)
        if problem:
            return problem
        if choices.timesteps is not None:
            return "a learned schedule is in continuous time: set timesteps: null"
        if choices.noise.draw != "time" or choices.noise.range != (0.0, 1.0):
            return (
                "a learned schedule compares two masks of one time, over all times: set "
                "noise.draw: time and noise.range: [0.0, 1.0]"
            )
        if choices.noise.prompts:
            return "noise.prompts: a learned schedule is trained on whole texts; set it to 0"
        return None
