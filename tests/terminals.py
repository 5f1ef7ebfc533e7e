"""Programs in a terminal, typed into."""

import os
import re
import select
import signal
import sys
import time


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def in_a_terminal(words: list[str], typed: list[tuple[str, str]], **env: str) -> str:
    """Type into a program in a terminal of 40 x 12; return the text that it shows.

    Each text of `typed` follows when its pattern, a regular expression, is seen; `^C` interrupts.
    """
    import fcntl
    import pty
    import struct
    import termios

    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "textdiff", *words], environment(**env))
    fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
    seen, waiting, until = b"", list(typed), time.monotonic() + 300
    while time.monotonic() < until:
        if not select.select([master], [], [], 1.0)[0]:
            continue
        try:
            seen += os.read(master, 4096)
        except OSError:  # the end, on Linux
            break
        if waiting and re.search(waiting[0][0].encode(), seen):
            text = waiting.pop(0)[1]
            if text == "^C":
                os.kill(pid, signal.SIGINT)
            else:
                os.write(master, text.encode())
    else:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(master)
    shown = seen.decode(errors="replace")
    assert not waiting, f"never shown: {waiting[0][0]!r}; but {shown[-2000:]!r}"
    return shown
