"""Encoding of a corpus piece by piece, in this process or in several others."""

import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from types import ModuleType
from typing import Any

from textdiff.data.backend import TextBackends
from textdiff.data.document_stream import Block
from textdiff.data.encode import Encoder, Ids
from textdiff.errors import DataError

_TASK_CHARACTERS = 2_000_000
_SHARD_CHARACTERS = 32_000_000  # what a kill loses at most

Submit = Callable[..., Future[Any]]


@dataclass(frozen=True)
class Task:
    """Pieces that are encoded together, and the shard that their tokens go to.

    Attributes:
        shard: its number.
        pieces: of documents, in order.
        goes_on: whether the first of them goes on from the task before.
    """

    shard: int
    pieces: list[Block]
    goes_on: bool

    @property
    def characters(self) -> int:
        """Characters of all pieces."""
        return sum(len(piece.text) for piece in self.pieces)


def tasks_of(pieces: Iterable[Block]) -> Iterator[Task]:
    """Group pieces so that a task is large enough to be worth sending to a process.

    Where tasks and shards end depends on the text alone.
    """
    held: list[Block] = []
    shard = size = shard_size = 0
    goes_on = False
    for piece in pieces:
        held.append(piece)
        size += len(piece.text) + 1
        if size >= _TASK_CHARACTERS:
            yield Task(shard, held, goes_on)
            shard_size += size
            held, size, goes_on = [], 0, not piece.last
            if shard_size >= _SHARD_CHARACTERS:
                shard, shard_size = shard + 1, 0
    if held:
        yield Task(shard, held, goes_on)


def encode_tasks(
    tasks: Iterable[Task], backends: TextBackends, num_proc: int
) -> Iterator[tuple[Task, list[Ids]]]:
    """Yield tasks with the ids of their pieces, in order, whichever process finishes first."""
    if num_proc == 1:
        encoder = Encoder(*backends)
        for task in tasks:
            yield task, _encode_task(encoder, task)
        return
    with workers(num_proc, _start_worker, *backends) as submit:
        # Two tasks in hand per process: the corpus must not pile up in the queue.
        pending: deque[tuple[Task, Future[list[Ids]]]] = deque()
        for task in tasks:
            pending.append((task, submit(_encode_in_worker, task)))
            if len(pending) >= 2 * num_proc:
                first, future = pending.popleft()
                yield first, future.result()
        for first, future in pending:
            yield first, future.result()


def _encode_task(encoder: Encoder, task: Task) -> list[Ids]:
    goes_on = [task.goes_on, *(not piece.last for piece in task.pieces[:-1])]
    return encoder([piece.text for piece in task.pieces], goes_on)


_worker_encoder: list[Encoder] = []


def _start_worker(first: str, later: str) -> None:
    _worker_encoder.append(Encoder(first, later))


def _encode_in_worker(task: Task) -> list[Ids]:
    return _encode_task(_worker_encoder[0], task)


@contextmanager
def workers(count: int, start: Callable[..., None], *values: Any) -> Iterator[Submit]:
    """Yield a function that runs another one in one of several processes.

    They are spawned, not forked: the threads of torch and of tokenizers do not survive a fork.

    Args:
        count: processes, at most.
        start: called once in each of them; importable, not from `__main__`.
        values: its arguments.

    Raises:
        DataError: a process ended before its work.
    """
    pool = ProcessPoolExecutor(
        count, get_context("spawn"), initializer=_begin, initargs=(start, *values)
    )

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        with _without_main():  # processes start here
            return pool.submit(function, *arguments)

    try:
        yield submit
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises ended unexpectedly, perhaps for lack of memory; start again, "
            "with a smaller data.num_proc if it happens again: what was finished is kept",
            code="lost_worker",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], *values: Any) -> None:
    """Prepare a process; signals for the whole group are for the one that started it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    start(*values)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep spawned processes from importing the caller's script.

    One without `if __name__ == "__main__":` would run once more in each of them, and wait there for
    the corpus that this process prepares.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
