"""Generation: decoding rules, draws, and the block loop."""

from textdiff.sampling.controls import Controls
from textdiff.sampling.generate import generate
from textdiff.sampling.job import Job
from textdiff.sampling.rules import RULES, Step

__all__ = ["RULES", "Controls", "Job", "Step", "generate"]
