"""Forks of a test as the ranks of a group under gloo."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from children import FORKS, forks


def in_ranks(count: int, work: Callable[[int], Any], seconds: float = 60) -> list:
    """Results of `work(rank)` in each of so many processes, which form a group.

    Accelerate finds the group as if its launcher had started them.
    """
    results = FORKS.Queue()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "WORLD_SIZE": str(count)}

    def member(rank: int, folder: Path) -> None:
        torch.set_num_threads(1)
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        PartialState._reset_state()  # of runs in the process that this one was forked from
        store, limit = f"file://{folder / 'store'}", timedelta(seconds=seconds)
        dist.init_process_group("gloo", store, limit, world_size=count, rank=rank)
        try:
            torch.save(work(rank), folder / f"{rank}.pt")
            results.put("")
        except Exception:
            results.put(traceback.format_exc())
        results.close()
        results.join_thread()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with forks(*(partial(member, rank, folder) for rank in range(count)), seconds=seconds):
            for _ in range(count):
                problem = results.get(timeout=seconds)
                assert not problem, problem
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
