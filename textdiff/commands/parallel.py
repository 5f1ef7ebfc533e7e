"""Threads and processes of a verb: how idle threads wait, and the ranks that share a job."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables that OpenMP reads once, when it is loaded."""

SPINS = "1000"
"""Turns before a thread sleeps; `evals/results/neighbour.json` says why."""


def spin_briefly() -> None:
    """Let idle threads sleep soon, unless the environment says how they wait.

    Threads meet at the end of every operation. Where another process has one of the cores, those
    that spin keep it from the one that they all wait for. Threads that sleep at once have to be
    woken for every operation, which costs time on an idle machine. GNU's OpenMP, which torch has
    on Linux, spins less by itself where it has more threads than cores, but not where other
    processes run. Other OpenMPs do not read the variable. It has no effect once torch is loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def idle_threads() -> str:
    """Describe how idle threads wait, with the variables that decide it."""
    values = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    words = ", ".join(f"{name}={value}" for name, value in values.items())
    if values == {"GOMP_SPINCOUNT": SPINS}:
        return f"spin briefly, then sleep ({words})"
    return f"as set by {words}" if values else "spin for a while (OpenMP's default)"


@dataclass(frozen=True)
class Processes:
    """This process among those that share a job.

    Attributes:
        rank: its number; number 0 prints and writes.
        count: number of processes.
        device: the device that the launcher gave it; None where it is alone.
        reduce: adds a float64 tensor over all of them.
        wait: returns when all of them have called it.
    """

    rank: int
    count: int
    device: str | None
    reduce: "Callable[[Tensor], Tensor]"
    wait: "Callable[[], None]" = lambda: None

    @property
    def first(self) -> bool:
        """True for the process that prints."""
        return self.rank == 0


def find_processes() -> Processes:
    """Find the processes of this job, which `accelerate launch` has started."""
    from accelerate import PartialState
    from accelerate.utils import reduce

    from textdiff.export.loading import cpu_only

    state = PartialState(cpu=cpu_only())
    state.wait_for_everyone()  # one that fails at once must not go before all have started
    if state.num_processes == 1:
        return Processes(0, 1, None, lambda nats: nats)

    def total(nats: "Tensor") -> Any:
        return reduce(nats.to(state.device), "sum").cpu()

    device = str(state.device)
    return Processes(
        state.process_index, state.num_processes, device, total, state.wait_for_everyone
    )
