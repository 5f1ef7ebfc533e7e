"""The mathematics: schedules, processes, noise, blocks and objectives.

Knows no network, file or screen, and imports torch at its first use only: configs are made of what
is registered here and in `objectives`.
"""

from collections.abc import Callable

from textdiff.diffusion.noise import ByCount, ByTime, NoiseMaker, Rates
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
from textdiff.registry import Registry

SCHEDULES = Registry[NoiseSchedule](
    "schedule", [LogLinear, Cosine, Polynomial, Geometric, HybridSchedule, Learned]
)
PROCESSES: dict[str, type[ForwardProcess]] = {p.name: p for p in (Absorbing, Uniform, Hybrid)}
NOISE_MAKERS: dict[str, Callable[[Rates], NoiseMaker]] = {"count": ByCount, "time": ByTime}
"""Makers of continuous time; `ByStep` is that of discrete time."""
