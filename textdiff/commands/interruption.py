"""Interruptions of a verb: SIGTERM and a terminal that goes away do what Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption(KeyboardInterrupt):
    """KeyboardInterrupt by another signal.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


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
