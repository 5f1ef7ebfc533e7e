"""Stopping politely: the first signal finishes the step and saves, a Ctrl-C after it aborts."""

import os
import select
import signal
from contextlib import suppress
from types import FrameType, TracebackType

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
