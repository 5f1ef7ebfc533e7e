"""What the processes of a run do together: agree, fail alike, and notice when one is gone."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from textdiff.errors import ConfigError, LostProcessError, TextDiffError

T = TypeVar("T")

# How long a process waits for the others. Longer than whatever the first process does alone: it
# prepares the corpus, draws samples and writes checkpoints. A process that dies is noticed at once.
TIMEOUT = timedelta(minutes=30)

# How gloo and NCCL say that an exchange failed; most of it arrives as a bare RuntimeError.
_SIGNS = ("gloo", "Connection closed by peer", "Connection reset", "pair closure", "NCCL")


_GUARD = 'put what the script does under `if __name__ == "__main__":`'


def refuse_reimport() -> None:
    """Ends a worker that has come here because it imports the script that started it.

    Raises:
        ConfigError: with the guard that the script lacks.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            f"a worker process imports this script, which would train again: {_GUARD}"
        )


def guard_hint() -> str:
    """The end of a sentence about a worker that ended, where workers import the script."""
    return "" if multiprocessing.get_start_method() == "fork" else f"; in a script, {_GUARD}"


def on_main(state: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """Runs an action on the main process alone; every process gets its result, or its error.

    Args:
        state: the processes.
        action: its result can be pickled.

    Raises:
        TextDiffError: what the action raised.
    """
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except TextDiffError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class Vote:
    """The largest of the processes' numbers, exchanged between hosts.

    The vote has a gloo group of its own: it waits for no device, and a process that died breaks
    it at once, which NCCL would not notice before its timeout.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if several else None

    def largest(self, value: int) -> int:
        """The largest value of all processes, the same on each of them."""
        if self._group is None:
            return value
        ballot = torch.tensor(value)
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)
        return int(ballot)


@contextmanager
def losing_none(state: Accelerator | PartialState) -> Iterator[None]:
    """Turns an exchange that fails because another process is gone into a sentence.

    Raises:
        LostProcessError: in place of that failure.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
        if state.num_processes == 1 or not lost:
            raise
        late = "Timed out" in str(error) or "timeout" in str(error)
        what = "did not answer in time" if late else "ended unexpectedly"
        raise LostProcessError(
            f"process {state.process_index} of {state.num_processes} stops: another process {what} "
            "(its own output says why, or the system killed it for memory); start the same command "
            "again to continue from the last checkpoint"
        ) from error
