"""Training steps whose numbers are the same bits every time, also on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from accelerate import Accelerator

from textdiff.config import Config
from textdiff.diffusion.randomness import Stream, bits


@contextmanager
def deterministic(active: bool) -> Iterator[None]:
    """Compute by kernels that always add in the same order, while entered.

    On a CPU all of ours do. On a GPU the fastest ones add in the order in which threads arrive. A
    resumed run then differs from an uninterrupted one by rounding. An operation that has no other
    kernel is an error there. torch would also fill new memory, which no operation here reads.

    Args:
        active: whether to do so.
    """
    if not active:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        memory.fill_uninitialized_memory = fill


def seed_dropout(config: Config, accelerator: Accelerator, step: int, micro_step: int) -> None:
    """Seed the dropout masks of a micro-batch, if there are any.

    Args:
        config: the run's config.
        accelerator: its processes, each of which has its own masks.
        step: of the run.
        micro_step: of the step.
    """
    if config.drops:
        index = micro_step * accelerator.num_processes + accelerator.process_index
        seed = bits(config.run.seed, Stream.DROPOUT, row=index, step=step)
        torch.manual_seed(int(seed))
