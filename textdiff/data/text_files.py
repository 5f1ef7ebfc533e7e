"""Text documents from files, each checked as it is read.

Text stays byte-exact: no newline is translated and nothing is stripped but a UTF-8 byte order mark.
A plain text file is read in blocks, so that it may be larger than memory; a row of the other kinds
is held whole. The readers of `datasets` convert whole files to tables before the first document.
They translate newlines and name neither the file nor the row that they refuse.

CSV is read by the standard library: pyarrow's reader guesses types, reads whole blocks before the
first row and accepts quotes that do not match.
"""

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from textdiff.data.conversation_rows import CONVERSATIONS, holds, wanted_columns
from textdiff.data.document_stream import (
    EMPTY,
    Omissions,
    TextBlock,
    missing_column,
    no_text,
    whole_texts,
)
from textdiff.data.formats import Kind, decoded, kind_of_file, opened, read_plain_file
from textdiff.data.json_rows import json_values, read_lines, read_values
from textdiff.data.paths import Files, find_files
from textdiff.data.table_rows import table_texts
from textdiff.errors import DataError
from textdiff.storage import refuse_pointer

_ROWS = 256  # of Parquet that are in memory at a time
_LONGEST_FIELD = 1 << 28


def read_separated(
    path: Path, column: str, omissions: Omissions, delimiter: str = ","
) -> Iterator[str]:
    """Yield the texts of a CSV or TSV file whose first row names the columns.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    with opened(path) as file:
        rows = _rows(csv.reader(_lines(decoded(file, str(path))), delimiter=delimiter, strict=True))
        names = _valid(next(rows, []), f"{path}, row of names")
        if names and column not in names:
            raise missing_column(str(path), column, names)
        for number, row in enumerate(rows, start=1):
            place = names.index(column)
            yield omissions.usable(_field, row, place, len(names), f"{path}, row {number}")


def _rows(reader: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
    """Yield rows that are not blank, and the errors of others."""
    while True:
        try:
            row = next((row for row in reader if row), None)
        except csv.Error as error:
            yield error
        else:
            if row is None:
                return
            yield row


def _valid(row: list[str] | csv.Error, where: str) -> list[str]:
    """Return a row whose quotes match.

    Raises:
        DataError: they do not.
    """
    if isinstance(row, csv.Error):
        raise DataError(f"{where}: not valid CSV ({row})", code="not_csv")
    return row


def _field(row: list[str] | csv.Error, place: int, count: int, where: str) -> str:
    fields = _valid(row, where)
    if len(fields) != count:
        raise DataError(
            f"{where}: {len(fields)} fields where the first row names {count}; put quotes around "
            "texts that hold separators",
            code="field_count",
        )
    return fields[place]


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, line ends included."""
    held: list[str] = []
    for block in blocks:
        for piece in io.StringIO(block, newline="\n"):
            held.append(piece)
            if piece.endswith("\n"):
                yield "".join(held)
                held = []
    if held:
        yield "".join(held)


def read_parquet(path: Path, column: str, omissions: Omissions) -> Iterator[str]:
    """Yield the texts of a Parquet file.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    with _readable(path, "Parquet"), pq.ParquetFile(path) as file:
        columns = wanted_columns(file.schema_arrow.names, str(path), column)
        batches = file.iter_batches(batch_size=_ROWS, columns=columns)
        yield from table_texts(batches, str(path), column, omissions)


def read_arrow(path: Path, column: str, omissions: Omissions) -> Iterator[str]:
    """Yield the texts of an Arrow file, in either of Arrow's two layouts.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    with _readable(path, "Arrow"), pa.memory_map(str(path)) as file:
        names, batches = _record_batches(file)
        columns = wanted_columns(names, str(path), column)
        yield from table_texts((b.select(columns) for b in batches), str(path), column, omissions)


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    """Turn errors of pyarrow, while entered, into one that names the file."""
    refuse_pointer(path, DataError)
    try:
        yield
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: not a readable {kind} file ({error})", code="unreadable"
        ) from None


def _record_batches(file: Any) -> tuple[list[str], Iterator[Any]]:
    """Return the names of the columns, and the batches."""
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        batches = (whole.get_batch(number) for number in range(whole.num_record_batches))
        return whole.schema.names, batches
    return stream.schema.names, iter(stream)


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
    if text_column == CONVERSATIONS and kind in ("text", "csv", "tsv"):
        raise DataError(
            f"{path}: conversations are read from .jsonl, .json and .parquet files, saved and hub "
            "datasets; convert it, or leave data.conversations out",
            code="not_conversations",
        )
    if kind == "json" and several and not holds(next(json_values(path), None), text_column):
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


def hold_conversations(names: Sequence[str], text_column: str) -> bool:
    """Return whether the rows of files are conversations, and have no text of their own.

    The first row of the first file decides. What cannot be read is refused by its reader.

    Args:
        names: paths and patterns; `-` is standard input, which is plain text.
        text_column: the column of texts.
    """
    if names[0] == "-":
        return False
    row: object = None
    with suppress(DataError, OSError, pa.ArrowException):
        first = find_files(names[0]).paths[0]
        kind = kind_of_file(first)
        if kind in ("lines", "json"):
            row = next(json_values(first), None)
        elif kind == "parquet":
            row = dict.fromkeys(pq.read_schema(first).names)
    return holds(row, CONVERSATIONS) and not holds(row, text_column)
