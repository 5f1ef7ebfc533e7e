"""Forks of a test as the ranks of a group under gloo."""

import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from children import FORKS, forks


def in_ranks(count: int, work: Callable[[int], Any], folder: Path, seconds: float = 60) -> list:
    """Results of `work(rank)` in each of so many processes, which form a group."""
    results = FORKS.Queue()
    store = f"file://{folder / 'store'}"

    def member(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store, timedelta(seconds=seconds), world_size=count, rank=rank
        )
        try:
            torch.save(work(rank), folder / f"{rank}.pt")
            results.put("")
        except Exception:
            results.put(traceback.format_exc())
        results.close()
        results.join_thread()

    with forks(*(partial(member, rank) for rank in range(count)), seconds=seconds):
        for _ in range(count):
            problem = results.get(timeout=seconds)
            assert not problem, problem
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
