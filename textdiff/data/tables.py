"""Rows of tables: CSV, TSV, Parquet and Arrow files.

CSV is read by the standard library: pyarrow's reader guesses types, reads whole blocks before the
first row and accepts quotes that do not match.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from textdiff.data.document_stream import Omissions, checked_text, missing_column
from textdiff.data.formats import decoded, opened
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
        rows = csv.reader(_lines(decoded(file, str(path))), delimiter=delimiter, strict=True)
        names = _next_row(rows, f"{path}, row of names")
        if names is None:
            return
        if column not in names:
            raise missing_column(str(path), column, names)
        place, number = names.index(column), 0
        while True:
            number += 1
            try:
                row = _next_row(rows, f"{path}, row {number}")
                if row is None:
                    return
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, row {number}: {len(row)} fields where the first row names "
                        f"{len(names)}; put quotes around texts that hold separators",
                        code="field_count",
                    )
            except DataError as error:
                omissions.bad_row(error)
            else:
                yield row[place]


def _next_row(rows: Iterator[list[str]], where: str) -> list[str] | None:
    """Return the next row that is not blank; None at the end.

    Raises:
        DataError: its quotes do not match.
    """
    try:
        return next((row for row in rows if row), None)
    except csv.Error as error:
        raise DataError(f"{where}: not valid CSV ({error})", code="not_csv") from None


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
    refuse_pointer(path, DataError)
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise missing_column(str(path), column, file.schema_arrow.names)
            batches = file.iter_batches(batch_size=_ROWS, columns=[column])
            columns = (batch.column(0) for batch in batches)
            yield from column_texts(columns, str(path), column, omissions)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Parquet", error) from None


def read_arrow(path: Path, column: str, omissions: Omissions) -> Iterator[str]:
    """Yield the texts of an Arrow file, in either of Arrow's two layouts.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    refuse_pointer(path, DataError)
    try:
        with pa.memory_map(str(path)) as file:
            names, batches = _record_batches(file)
            if column not in names:
                raise missing_column(str(path), column, names)
            columns = (batch.column(column) for batch in batches)
            yield from column_texts(columns, str(path), column, omissions)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, "Arrow", error) from None


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable {kind} file ({error})", code="unreadable")


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


def column_texts(
    columns: Iterable[Any], where: str, column: str, omissions: Omissions
) -> Iterator[str]:
    """Yield the strings of Arrow arrays.

    Args:
        columns: the arrays, one after another.
        where: what holds them, for messages.
        column: its name.
        omissions: refuses rows that hold something else, or counts them.

    Raises:
        DataError: a row that cannot be used.
    """
    row = 0
    for values in columns:
        for value in _values(values):
            row += 1
            try:
                text = checked_text(value, f"{where}, row {row}", column)
            except DataError as error:
                omissions.bad_row(error)
            else:
                yield text


def _values(values: Any) -> Iterator[Any]:
    """Yield Python values; bytes where a string is not UTF-8."""
    try:
        yield from values.to_pylist()
    except UnicodeDecodeError:
        for value in values:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield b""
