"""Generation: decoding rules, draws, and the block loop."""

from textdiff.sampling.constraints import Constraint, Draws, build_pattern
from textdiff.sampling.context import Context, Scene
from textdiff.sampling.controls import Controls, Hook
from textdiff.sampling.generate import Cache, generate
from textdiff.sampling.job import Job
from textdiff.sampling.rules import RULES
from textdiff.sampling.segment import Segment, Step

__all__ = [
    "RULES",
    "Cache",
    "Constraint",
    "Context",
    "Controls",
    "Draws",
    "Hook",
    "Job",
    "Scene",
    "Segment",
    "Step",
    "build_pattern",
    "generate",
]
