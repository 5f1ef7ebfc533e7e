"""The program `textdiff`, also as `python -m textdiff`: Ctrl-C ends it quietly at any moment.

`textdiff.cli` alone cannot: its imports take a good part of a second, and once torch is loaded so
does the end of the interpreter.
"""

import atexit
import os
import signal
import sys

from textdiff.signals import exit_code


def run_program() -> int:
    """Run the command line in a process of its own.

    Returns:
        The exit code.
    """
    # Registered first, it runs last: later the interpreter has no handlers, and the default kills.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    usual = signal.getsignal(signal.SIGINT)
    # Not by an exception, which some libraries lose or replace while they are imported.
    _leave_at_ctrl_c(128 + signal.SIGINT)
    from textdiff.cli import main

    try:
        signal.signal(signal.SIGINT, usual)
        code = main()
    except KeyboardInterrupt as stop:
        code = exit_code(stop)
    _leave_at_ctrl_c(code)
    # Python sends itself SIGINT if an interrupt has left code that was compiled from a string, as
    # methods of dataclasses are, although it was caught. Such code that ends well clears that.
    exec("")
    return code


def _leave_at_ctrl_c(code: int) -> None:
    """End the process at Ctrl-C, unless that is ignored, as in a shell's background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(code))


if __name__ == "__main__":
    sys.exit(run_program())
