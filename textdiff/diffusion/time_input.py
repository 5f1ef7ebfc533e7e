"""Input of networks with time conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from textdiff.lazy import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family


NO_STEPS = "time_input step counts steps: set timesteps, for example 1000, or time_input: sigma"


def step_index(family: Family, alpha: Tensor) -> Tensor:
    """Return the index of the nearest step of discrete time; 0 has the least noise."""
    assert family.timesteps is not None
    return (family.timesteps * family.schedule.t_of_alpha(alpha)).round() - 1.0


TIME_INPUTS: dict[str, Callable[[Family, Tensor], Tensor]] = {
    "sigma": lambda family, alpha: -torch.log(alpha),
    "time": lambda family, alpha: family.schedule.t_of_alpha(alpha),
    "step": step_index,
}
"""Functions of a family and survival probabilities.

Total noise, time itself (GIDD), or the index of a step of discrete time (tiny-diffusion).
"""
