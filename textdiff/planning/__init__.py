"""What a run will need, worked out before it: memory per device, and time."""

from textdiff.planning.memory import Memory, largest_micro_batch, peak_memory
from textdiff.planning.network import Plan, plan
from textdiff.planning.speed import tokens_per_second, training_flops

__all__ = [
    "Memory",
    "Plan",
    "largest_micro_batch",
    "peak_memory",
    "plan",
    "tokens_per_second",
    "training_flops",
]
