"""Processes that work beside this one and need nothing of the script that started it."""

import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import Any

from textdiff.errors import DataError

Submit = Callable[..., Future[Any]]


@contextmanager
def workers(count: int, start: Callable[..., None], *values: Any) -> Iterator[Submit]:
    """Yields a function that runs another one in one of several processes.

    They are spawned, not forked: the threads of torch and of tokenizers do not survive a fork.

    Args:
        count: how many processes, at most.
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
            "a process that tokenises ended unexpectedly, perhaps for want of memory; start again, "
            "with a smaller data.num_proc if it happens again: what was finished is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(start: Callable[..., None], *values: Any) -> None:
    """Prepares a process; signals for the whole group are for the one that started it."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    start(*values)


@contextmanager
def _without_main() -> Iterator[None]:
    """While entered, processes that are spawned do not import the caller's script.

    One without `if __name__ == "__main__":` would run once more in each of them, and wait there for
    the corpus that this process prepares.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
