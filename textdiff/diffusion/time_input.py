"""Input of networks with time conditioning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from textdiff.lazy import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.schedule import NoiseSchedule

TIME_INPUTS: dict[str, Callable[[NoiseSchedule, Tensor], Tensor]] = {
    "sigma": lambda schedule, alpha: -torch.log(alpha),
    "time": lambda schedule, alpha: schedule.t_of_alpha(alpha),
}
"""Functions of a schedule and survival probabilities: total noise, or time itself (GIDD)."""
