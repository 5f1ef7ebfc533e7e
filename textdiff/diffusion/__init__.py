"""The mathematics: schedules, processes, noise, blocks and objectives; the section `diffusion`.

Independent of networks, files and screens. Imports torch at its first use only, since configs are
made of what is registered here and in `objectives`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from textdiff.diffusion.noise import ByCount, ByTime, NoiseMaker, Rates
from textdiff.diffusion.objectives import MDLM, OBJECTIVES, Objective
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.processes import Absorbing, Hybrid, Uniform
from textdiff.diffusion.schedule import (
    Cosine,
    Geometric,
    HybridSchedule,
    Learned,
    LogLinear,
    NoiseSchedule,
    Polynomial,
)
from textdiff.registry import NameOf, OneOf, Registry
from textdiff.section import Number, Section, Tensor, Whole, torch

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family

SCHEDULES = Registry[NoiseSchedule](
    "schedule", [LogLinear, Cosine, Polynomial, Geometric, HybridSchedule, Learned]
)
PROCESSES: dict[str, type[ForwardProcess]] = {p.name: p for p in (Absorbing, Uniform, Hybrid)}
NOISE_MAKERS: dict[str, Callable[[Rates], NoiseMaker]] = {"count": ByCount, "time": ByTime}
"""Makers of continuous time; `ByStep` is that of discrete time."""

NO_STEPS = "time_input step counts steps: set timesteps, for example 1000, or time_input: sigma"


def step_index(family: "Family", alpha: Tensor) -> Tensor:
    """Return the index of the nearest step of discrete time; 0 has the least noise."""
    assert family.timesteps is not None
    return (family.timesteps * family.schedule.t_of_alpha(alpha)).round() - 1.0


TIME_INPUTS: dict[str, "Callable[[Family, Tensor], Tensor]"] = {
    "sigma": lambda family, alpha: -torch.log(alpha),
    "time": lambda family, alpha: family.schedule.t_of_alpha(alpha),
    "step": step_index,
}
"""Functions of a family and survival probabilities.

Total noise, time itself (GIDD), or the index of a step of discrete time (tiny-diffusion).
"""


class NoiseConfig(Section):
    """Draw of training noise."""

    draw: Annotated[str, NameOf(NOISE_MAKERS)] = Field(
        "count", description="draw the number of masked tokens, or a time"
    )
    range: tuple[Number, Number] | Literal["search"] = Field(
        (0.0, 1.0),
        description="mask rates that training draws from, or `search`: at each evaluation those of "
        "smallest variance",
    )
    complementary: bool = Field(
        False,
        description="read every row under two masks, each of which masks what the other leaves",
    )
    prompts: Number = Field(
        0.0, ge=0.0, le=1.0, description="share of the rows whose beginning is given, free of noise"
    )
    prompt_dropout: Number = Field(
        0.0, ge=0.0, le=1.0, description="share of those whose prompt is hidden behind masks"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "NoiseConfig":
        if self.prompt_dropout and not self.prompts:
            raise ValueError(
                f"prompt_dropout {self.prompt_dropout} hides prompts, and there are none: set "
                "prompts, the share of rows that have one, for example 0.5"
            )
        if self.range != "search" and not 0.0 <= self.range[0] < self.range[1] <= 1.0:
            low, high = self.range
            raise ValueError(f"range {low} {high}: needs 0 <= low < high <= 1")
        return self

    def refusal(self, choices: "DiffusionConfig") -> str | None:
        """Return why noise cannot be drawn so with the other choices; None: it can."""
        objective, block_sizes = choices.objective, choices.block_sizes
        if self.range == "search" and not objective.trains_on_bound:
            return (
                "a range is searched by the variance of the bound's own terms: set "
                "objective.loss_weight: elbo, or a fixed noise.range"
            )
        if self.prompts and set(block_sizes) == {1}:
            return (
                "noise.prompts: in blocks of one token all preceding tokens are given anyway; set "
                "it to 0"
            )
        return self._pairs_problem(choices) if self.complementary else None

    def _pairs_problem(self, choices: "DiffusionConfig") -> str | None:
        """Return why masks cannot be drawn in complementary pairs; None: they can."""
        advice = "or noise.complementary: false"
        if PROCESSES[choices.process].replaces_tokens:
            return (
                f"noise.complementary is of masks, and process {choices.process} replaces tokens: "
                f"set process: absorbing, {advice}"
            )
        if isinstance(choices.schedule, Learned):
            return (
                "a learned schedule compares two independent masks of every row, which "
                f"complementary ones are not: choose another schedule, {advice}"
            )
        if choices.timesteps is not None:
            return (
                "the complement of a mask at one of T steps is at none of them: set timesteps: "
                f"null, {advice}"
            )
        if set(choices.block_sizes) == {1}:
            return (
                "in blocks of one token one of two complementary masks is empty: set a larger "
                f"block_size, {advice}"
            )
        if self.range == "search" or abs(sum(self.range) - 1.0) > 1e-9:
            return (
                "the complement of a mask rate is one minus it: set a noise.range that is "
                f"symmetric, such as [0.0, 1.0] or [0.2, 0.8], {advice}"
            )
        return None


class DiffusionConfig(Section):
    """Forward process, schedule, objective and block size: the five choices without the rule."""

    process: Annotated[str, NameOf(PROCESSES)] = Field("absorbing", description="forward process")
    schedule: Annotated[NoiseSchedule, OneOf(SCHEDULES)] = LogLinear()
    objective: Annotated[Objective, OneOf(OBJECTIVES)] = MDLM()
    noise: NoiseConfig = NoiseConfig()
    block_size: Whole | tuple[Whole | None, ...] | None = Field(
        None,
        description="tokens per block; null: the whole sequence is one block; a list: one of them "
        "at random in every step, the first being the default of the trained model",
    )
    timesteps: Whole | None = Field(
        None, ge=1, description="steps of discrete time; null: continuous time"
    )
    time_input: Annotated[str, NameOf(TIME_INPUTS)] = Field(
        "sigma", description="input of networks with time conditioning: total noise, or time"
    )

    @property
    def block_sizes(self) -> tuple[int | None, ...]:
        """Every size that training uses; the first is the trained model's default."""
        return self.block_size if isinstance(self.block_size, tuple) else (self.block_size,)

    @model_validator(mode="after")
    def _consistent(self) -> "DiffusionConfig":
        problem = (
            self._sizes_problem()
            or self.objective.refusal(self)
            or self.schedule.refusal(self)
            or self._steps_problem()
            or self.noise.refusal(self)
        )
        if problem:
            raise ValueError(problem)
        return self

    def _sizes_problem(self) -> str | None:
        sizes = self.block_sizes
        if not sizes:
            return "block_size is an empty list: name at least one size"
        small = [size for size in sizes if size is not None and size < 1]
        if small:
            return f"block_size {small[0]}: a block has at least one token"
        twice = [size for size in sizes if sizes.count(size) > 1]
        return f"block_size lists {twice[0]} twice" if twice else None

    def _steps_problem(self) -> str | None:
        if self.timesteps is None:
            return NO_STEPS if self.time_input == "step" else None
        if self.timesteps == 1:
            return (
                "timesteps: 1 draws all tokens at once from pure noise, independently of each "
                "other: there is nothing to learn but their frequencies; set timesteps: 2 or more"
            )
        if self.noise.draw != "time" or self.noise.range != (0.0, 1.0):
            return (
                "with timesteps noise is drawn at the steps' own times: set noise.draw: time and "
                "noise.range: [0.0, 1.0]"
            )
        return None
