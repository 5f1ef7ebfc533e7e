"""One process or several: `accelerate launch` starts them, here they find each other."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that share a job.

    Attributes:
        rank: its number; number 0 speaks and writes.
        count: how many there are.
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
        """Whether this is the one that prints."""
        return self.rank == 0


def find_processes() -> Processes:
    """The processes of this job, as accelerate knows them."""
    from accelerate import PartialState
    from accelerate.utils import reduce

    from textdiff.export.loading import cpu_only

    state = PartialState(cpu=cpu_only())
    state.wait_for_everyone()  # one that fails at once must not go before all have found it
    if state.num_processes == 1:
        return Processes(0, 1, None, lambda nats: nats)

    def total(nats: "Tensor") -> Any:
        return reduce(nats.to(state.device), "sum").cpu()

    return Processes(
        state.process_index,
        state.num_processes,
        str(state.device),
        total,
        state.wait_for_everyone,
    )
