"""Texts that a command line names: files, folders, patterns, and `-` for standard input."""

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

from textdiff.errors import ConfigError, DataError

if TYPE_CHECKING:
    from textdiff.data.json_rows import Row

STANDARD_INPUT = "standard input"


def read_documents(names: Sequence[str], text_column: str) -> Iterator[str]:
    """Yield the documents of files, folders and patterns; `-` is standard input as one document.

    All names are looked up first; a file is opened when its first document is wanted.

    Raises:
        ConfigError: standard input is named twice, or cannot be used here.
        DataError: a place that holds no usable text.
    """
    from textdiff.data.paths import find_files
    from textdiff.data.text_files import iterate_documents

    check_standard_input(names)
    sources = [None if name == "-" else find_files(name) for name in names]
    for source in sources:
        if source is None:
            yield read_standard_input()
        else:
            yield from iterate_documents([source], text_column)


def given_rows(names: Sequence[str]) -> "Iterator[Row]":
    """Yield the rows of JSON lines files; `-` is standard input, also in lines.

    Raises:
        ConfigError: see `read_documents`.
        DataError: see `read_documents`.
    """
    from textdiff.data.json_rows import rows_of, stream_rows
    from textdiff.data.paths import find_files

    check_standard_input(names)
    sources = [None if name == "-" else find_files(name) for name in names]
    for source in sources:
        if source is None:
            yield from stream_rows(standard_input(), STANDARD_INPUT)
        else:
            yield from rows_of(source)


def check_standard_input(names: Sequence[str]) -> None:
    """Make sure that standard input is read once, and by a process that has it for itself.

    Raises:
        ConfigError: it is not.
    """
    count = sum(name == "-" for name in names)
    if count > 1:
        raise ConfigError("standard input can be read once: give `-` once")
    if count and several_processes():
        raise ConfigError("several processes cannot share standard input: write it to a file")


def several_processes() -> bool:
    """Return whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def read_standard_input() -> str:
    """Return the whole of standard input as one text, under the rules for text files.

    Raises:
        DataError: it holds no usable text.
    """
    from textdiff.data.document_stream import no_text
    from textdiff.data.formats import read_plain

    text = "".join(block.text for block in read_plain(standard_input(), STANDARD_INPUT))
    if not text:
        raise no_text(STANDARD_INPUT)
    return text


def read_text(name: str) -> str:
    """Return the text of one file, or of standard input, under the rules for text files.

    Raises:
        ConfigError: see `check_standard_input`.
        DataError: it cannot be read.
    """
    from textdiff.data.formats import read_plain_file
    from textdiff.data.paths import existing, missing

    if name == "-":
        check_standard_input([name])
        return read_standard_input()
    path = existing(name)
    if path is None:
        raise missing(name)
    if path.is_dir():
        raise DataError(f"{name} is a folder; name a file")
    return "".join(block.text for block in read_plain_file(path))


def standard_input() -> BinaryIO:
    """Return the bytes of standard input.

    Raises:
        DataError: it is closed.
    """
    if sys.stdin is None or sys.stdin.closed:
        raise DataError(f"{STANDARD_INPUT} is closed; pipe a text into it")
    return sys.stdin.buffer
