"""Stops by signals: a verb does at SIGTERM and SIGHUP what it does at Ctrl-C; a run saves first."""

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_PATIENCE = 1.0
"""Seconds that a reader may take to make room."""


class StopRequest:
    """Memory of the first SIGINT, SIGTERM or SIGHUP while entered: `signal`, or 0.

    A terminal that closes sends SIGHUP more than once, and launchers send SIGTERM after the system
    has: only Ctrl-C aborts what is being saved. A SIGHUP that `nohup` has ignored stays ignored.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        hangup = getattr(signal, "SIGHUP", None)  # unknown on Windows
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)
        for number in numbers:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number
        _leave_blocked_streams()


def _leave_blocked_streams() -> None:
    """Point standard streams without a reader to nowhere, so that their writers continue.

    A write that a signal interrupts is tried again after its handler: a run that waits for a
    stopped terminal or a full pipe would never get to what it has to save.
    """
    for number in (1, 2):
        with suppress(OSError, ValueError):  # closed, or no `select` for it (Windows)
            if not select.select([], [number], [], _PATIENCE)[1]:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


_NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption(KeyboardInterrupt):
    """KeyboardInterrupt by another signal.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a process that Ctrl-C or another signal has interrupted."""
    return 128 + (stop.number if isinstance(stop, Interruption) else signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `Interruption` in the main thread at the first SIGTERM or SIGHUP while entered.

    Only where the system's default is in force: `nohup` has SIGHUP ignored, and a program that
    calls a verb may have handlers of its own.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in _NUMBERS if signal.getsignal(number) is signal.SIG_DFL]

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in ours:  # a shell and the system both send SIGHUP: once is enough
            signal.signal(each, signal.SIG_IGN)
        raise Interruption(number)

    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
