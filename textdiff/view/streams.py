"""Standard streams that do not fail: what happens to the screen must not cost a result.

While a verb runs, standard output and standard error are wrapped. Characters that the encoding does
not have are written another way. A stream whose reader is gone, or that is closed or full, takes
what is written and drops it.
"""

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_REPLACE = "textdiff.replace"  # name of the error handler

# Our own signs, and those that texts have most often.
_SIGNS = {
    "≤": "<=",
    "≥": ">=",
    "≈": "~",
    "±": "+/-",
    "×": "x",
    "→": "->",
    "←": "<-",
    "…": "...",
    "–": "-",
    "—": "--",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "•": "*",
    "·": "_",
    "⏎": "\\n",
    "⇥": "\\t",
    "␍": "\\r",
    "\xa0": " ",
    "\ufffd": "?",
}
_HORIZONTAL, _VERTICAL = "─━┄┅┈┉╌╍═╴╶╸╺╼╾", "│┃┆┇┊┋╎╏║╵╷╹╻╽╿"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) if os.name == "posix" else (errno.ENOSPC,)


def _replacement(character: str) -> str:
    """Return a character in ASCII: a sign that looks alike, else its number."""
    if character in _SIGNS:
        return _SIGNS[character]
    if character in _HORIZONTAL:
        return "-"
    if character in _VERTICAL:
        return "|"
    if "\u2500" <= character <= "\u257f":  # corners and crossings of boxes
        return "+"
    if "\u2580" <= character <= "\u259f":  # parts of bars
        return "#"
    return character.encode("ascii", "backslashreplace").decode()


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_replacement, error.object[error.start : error.end])), error.end


codecs.register_error(_REPLACE, _replace)


def fitted(text: str, encoding: str | None) -> str:
    """Return a text whose characters all exist in an encoding; those that do not are replaced."""
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, _REPLACE).decode(encoding)
    return text


class SafeStream:
    """Text stream for writing that raises no errors; otherwise it is the stream it wraps.

    Attributes:
        failure: the error after which nothing is written any more.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        """Write a text as well as the encoding allows."""
        if self.failure is None:
            try:
                self._write(text)
            except Exception as error:
                self._drop(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand on what is buffered."""
        if self.failure is None:
            try:
                self.stream.flush()
            except Exception as error:
                self._drop(error)

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        try:
            return self.stream.isatty()
        except Exception:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _write(self, text: str) -> None:
        text = fitted(text, getattr(self.stream, "encoding", None))
        try:
            self.stream.write(text)
        except UnicodeEncodeError:  # it encodes differently from what it says
            self.stream.write(fitted(text, "ascii"))

    def _drop(self, error: Exception) -> None:
        self.failure = error
        with suppress(Exception):
            number = self.stream.fileno()
            if number in (1, 2):  # what is still buffered would fail again at the process's end
                _discard(number)


def check_written(stream: object) -> None:
    """Raise the error of a stream that had no room for what was written.

    A reader that went away has what it wanted; a full disk lacks a part of the result.

    Raises:
        OSError: the disk is full.
    """
    failure = getattr(stream, "failure", None)
    if isinstance(failure, OSError) and failure.errno in _FULL:
        raise OSError(failure.errno, failure.strerror, "standard output")


def has_reader(stream: object) -> bool:
    """Return whether what is written to a stream still arrives somewhere."""
    return getattr(stream, "failure", None) is None


@contextmanager
def safe_streams() -> Iterator[None]:
    """Give the process its three standard streams while entered, the two for writing safe.

    Those that were closed when the process started lead nowhere. Left closed, their numbers would
    go to the next files that are opened, and whatever writes to the screen would write into these.
    """
    for number in range(3):
        _prepare(number)
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    out, error = (SafeStream(stream or _nowhere()) for stream in (sys.stdout, sys.stderr))
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, error)
    try:
        yield
    finally:
        out.flush()
        error.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _prepare(number: int) -> None:
    """Open a descriptor that is closed, and makes one wait that would not wait for its reader."""
    try:
        os.fstat(number)
    except OSError:
        with suppress(OSError):
            _discard(number)
        return
    if number and hasattr(os, "set_blocking"):
        with suppress(OSError):
            os.set_blocking(number, True)


def _discard(number: int) -> None:
    """Let a descriptor lead nowhere."""
    spare = os.open(os.devnull, os.O_RDWR)
    if spare == number:
        os.set_inheritable(number, True)
        return
    os.dup2(spare, number)
    os.close(spare)
