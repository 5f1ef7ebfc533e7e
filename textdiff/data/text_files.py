"""Text documents from files, each checked as it is read.

Text stays byte-exact: no newline is translated and nothing is stripped but a UTF-8 byte order mark.
A plain text file is read in blocks, so that it may be larger than memory; a row of the other kinds
is held whole.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from textdiff.data.document_stream import (
    EMPTY,
    Block,
    Omissions,
    Tally,
    all_bad,
    blank,
    no_text,
    whole_texts,
)
from textdiff.data.formats import DAMAGED, Kind, kind_of, open_bytes
from textdiff.data.json_rows import holds_column, read_lines, read_values
from textdiff.data.paths import Files, find_files
from textdiff.data.tables import read_arrow, read_parquet, read_separated
from textdiff.data.utf8 import decoded
from textdiff.errors import DataError

_log = logging.getLogger(__name__)


def read_texts(paths: Sequence[str], text_column: str = "text") -> list[str]:
    """Reads local files, folders and patterns into memory, for scoring.

    Args:
        paths: names, read in the order given.
        text_column: the JSON key or column that holds the text.

    Returns:
        The documents: one per text file, or per row of the other kinds.

    Raises:
        DataError: a path is missing, or holds no usable text; the message names the place.
    """
    return list(iterate_documents([find_files(str(path)) for path in paths], text_column))


def iterate_documents(sources: Iterable[Files], text_column: str) -> Iterator[str]:
    """Yields whole documents; a file is opened when its first one is wanted.

    Raises:
        DataError: see `read_texts`.
    """
    for files in sources:
        tally, usable = Tally(), True
        try:
            yield from whole_texts(read_files(files, text_column, tally))
        except DataError:  # says enough
            usable = False
            raise
        finally:
            if usable:
                report(files.name, Omissions.of(tally).with_files(files.left_out))


def report(name: str, omissions: Omissions) -> None:
    """Logs what is left out of a source."""
    for line in omissions.sentences(name):
        _log.warning("%s", line)


def read_files(files: Files, text_column: str, tally: Tally) -> Iterator[Block]:
    """Yields the blocks of all documents; an empty string in a row is not one.

    Args:
        files: what to read.
        text_column: the JSON key or column that holds the text.
        tally: restarted, and told what is left out.

    Raises:
        DataError: see `read_texts`.
    """
    tally.restart()
    nothing = True
    for path in files.paths:
        for block in read_file(path, text_column, tally, files.several):
            nothing = nothing and block.text.isspace()
            yield block
    if nothing and tally.bad_rows:
        raise all_bad(files.name, tally)
    if nothing:
        raise blank(files.name) if files.several else no_text(files.name)


def read_file(path: Path, text_column: str, tally: Tally, several: bool) -> Iterator[Block]:
    """Yields the blocks of one file's documents.

    Args:
        path: the file.
        text_column: the JSON key or column that holds the text.
        tally: told about rows and files that are left out.
        several: whether it is one of a folder, where a JSON file may hold something else.

    Raises:
        DataError: see `read_texts`.
    """
    kind = kind_of(path)
    if kind == "json" and several and not holds_column(path, text_column):
        tally.files[f".json without a key {text_column!r}"] += 1
        return
    bad, empty = tally.bad_rows, True
    for block in _read_blocks(path, kind, text_column, tally):
        empty = False
        yield block
    if empty and several and tally.bad_rows == bad:
        tally.files[EMPTY] += 1


def _read_blocks(path: Path, kind: Kind, column: str, tally: Tally) -> Iterator[Block]:
    if kind == "text":
        return read_plain_file(path)
    return (Block(text, True) for text in _read_rows(path, kind, column, tally) if text)


def _read_rows(path: Path, kind: Kind, column: str, tally: Tally) -> Iterator[str]:
    if kind == "lines":
        return read_lines(path, column, tally)
    if kind == "json":
        return read_values(path, column, tally)
    if kind == "parquet":
        return read_parquet(path, column, tally)
    if kind == "arrow":
        return read_arrow(path, column, tally)
    return read_separated(path, column, "\t" if kind == "tsv" else ",", tally)


def read_plain_file(path: Path) -> Iterator[Block]:
    """Yields what `read_plain` does of a file.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    try:
        with open_bytes(path) as file:
            yield from read_plain(file, str(path))
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def read_plain(file: BinaryIO, where: str) -> Iterator[Block]:
    """Yields the blocks of a text that is one document; of white space alone, none.

    Args:
        file: the bytes.
        where: their name for messages.

    Raises:
        DataError: they are not UTF-8 text.
        OSError: they cannot be read.
    """
    held = ""  # a block behind, to know which one is the last
    for text in _from_first_word(decoded(file, where)):
        if held:
            yield Block(held, False)
        held = text
    if held:
        yield Block(held, True)


def _from_first_word(texts: Iterator[str]) -> Iterator[str]:
    """Yields all texts once one of them is not white space."""
    spaces: list[str] = []
    for text in texts:
        spaces.append(text)
        if not text.isspace():
            yield from spaces
            yield from texts
