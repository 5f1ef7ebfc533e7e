"""Text documents from files, each checked as it is read.

Text stays byte-exact: no newline is translated and nothing is stripped but a UTF-8 byte order mark.
A plain text file is read in blocks, so that it may be larger than memory; a row of the other kinds
is held whole. The readers of `datasets` convert whole files to tables before the first document,
translate newlines and name neither the file nor the row that they refuse.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from textdiff.data.document_stream import EMPTY, Omissions, TextBlock, no_text, whole_texts
from textdiff.data.formats import Kind, decoded, kind_of_file, opened
from textdiff.data.json_rows import holds_column, read_lines, read_values
from textdiff.data.paths import Files, find_files
from textdiff.data.tables import read_arrow, read_parquet, read_separated
from textdiff.errors import DataError

_log = logging.getLogger(__name__)

_ROW_READERS: dict[Kind, Callable[[Path, str, Omissions], Iterator[str]]] = {
    "lines": read_lines,
    "json": read_values,
    "csv": read_separated,
    "tsv": partial(read_separated, delimiter="\t"),
    "parquet": read_parquet,
    "arrow": read_arrow,
}


def read_texts(paths: Sequence[str], text_column: str = "text") -> list[str]:
    """Read local files, folders and patterns into memory, for scoring.

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
    """Yield whole documents; a file is opened when its first one is wanted.

    Raises:
        DataError: see `read_texts`.
    """
    for files in sources:
        omissions, refused = Omissions(unread=files.left_out), False
        try:
            yield from whole_texts(read_files(files, text_column, omissions))
        except DataError:
            refused = True
            raise
        finally:  # also where the caller has enough documents
            for line in [] if refused else omissions.sentences(files.name):
                _log.warning("%s", line)


def read_files(files: Files, text_column: str, omissions: Omissions) -> Iterator[TextBlock]:
    """Yield the blocks of all documents; an empty string in a row is not one.

    Args:
        files: what to read.
        text_column: the JSON key or column that holds the text.
        omissions: restarted, and filled by what is left out.

    Raises:
        DataError: see `read_texts`.
    """
    omissions.restart()
    nothing = True
    for path in files.paths:
        for block in read_file(path, text_column, omissions, files.several):
            nothing = nothing and block.text.isspace()
            yield block
    if nothing:
        raise no_text(files.name, omissions, files.several)


def read_file(
    path: Path, text_column: str, omissions: Omissions, several: bool
) -> Iterator[TextBlock]:
    """Yield the blocks of one file's documents.

    Args:
        path: the file.
        text_column: the JSON key or column that holds the text.
        omissions: counts rows and files that are left out.
        several: whether it is one of a folder, where a JSON file may hold something else.

    Raises:
        DataError: see `read_texts`.
    """
    kind = kind_of_file(path)
    if kind == "json" and several and not holds_column(path, text_column):
        omissions.files[f".json without a key {text_column!r}"] += 1
        return
    bad, empty = omissions.bad_rows, True
    if kind == "text":
        blocks = read_plain_file(path)
    else:
        rows = _ROW_READERS[kind](path, text_column, omissions)
        blocks = (TextBlock(text, True) for text in rows if text)
    for block in blocks:
        empty = False
        yield block
    if empty and several and omissions.bad_rows == bad:
        omissions.files[EMPTY] += 1


def read_plain_file(path: Path) -> Iterator[TextBlock]:
    """Yield the blocks of a text file, which is one document; see `read_plain`.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    with opened(path) as file:
        yield from read_plain(file, str(path))


def read_plain(file: BinaryIO, where: str) -> Iterator[TextBlock]:
    """Yield the blocks of a text that is one document; of white space alone, none.

    Args:
        file: the bytes.
        where: their name for messages.

    Raises:
        DataError: they are not UTF-8 text.
        OSError: they cannot be read.
    """
    held, blank = "", True  # one block is held, to know which one is the last
    spaces: list[str] = []
    for text in decoded(file, where):
        if blank and text.isspace():
            spaces.append(text)
            continue
        if blank:
            text, blank = "".join([*spaces, text]), False
        if held:
            yield TextBlock(held, False)
        held = text
    if held:
        yield TextBlock(held, True)
