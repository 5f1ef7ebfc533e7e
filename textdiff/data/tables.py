"""Rows of tables: CSV, TSV, Parquet and Arrow files."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from textdiff.data.decode import decoded
from textdiff.data.formats import DAMAGED, open_bytes
from textdiff.data.rows import Tally, checked_text, missing_column
from textdiff.errors import DataError
from textdiff.storage import refuse_pointer

_ROWS = 256  # of Parquet that are in memory at a time
_LONGEST_FIELD = 1 << 28


def read_separated(path: Path, column: str, delimiter: str, tally: Tally) -> Iterator[str]:
    """Yields the texts of a CSV or TSV file whose first row names the columns.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    try:
        with open_bytes(path) as file:
            rows = csv.reader(_lines(decoded(file, str(path))), delimiter=delimiter, strict=True)
            names = _next_row(rows, f"{path}, row of names")
            if names is None:
                return
            if column not in names:
                raise missing_column(str(path), column, names)
            yield from _separated(rows, names, str(path), column, tally)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _separated(
    rows: Iterator[list[str]], names: list[str], where: str, column: str, tally: Tally
) -> Iterator[str]:
    place, number = names.index(column), 0
    while True:
        number += 1
        try:
            row = _next_row(rows, f"{where}, row {number}")
            if row is None:
                return
            if len(row) != len(names):
                raise DataError(
                    f"{where}, row {number}: {len(row)} fields where the first row names "
                    f"{len(names)}; put quotes around texts that hold separators"
                )
        except DataError as error:
            tally.bad_row(error)
            continue
        yield row[place]


def _next_row(rows: Iterator[list[str]], where: str) -> list[str] | None:
    """The next row that is not blank; None at the end.

    Raises:
        DataError: its quotes do not match.
    """
    try:
        return next((row for row in rows if row), None)
    except csv.Error as error:
        raise DataError(f"{where}: not valid CSV ({error})") from None


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Yields the lines of a text, line ends included."""
    held: list[str] = []
    for block in blocks:
        *whole, rest = block.split("\n")
        for line in whole:
            held.append(line + "\n")
            yield "".join(held)
            held = []
        if rest:
            held.append(rest)
    if held:
        yield "".join(held)


def read_parquet(path: Path, column: str, tally: Tally) -> Iterator[str]:
    """Yields the texts of a Parquet file.

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
            yield from column_texts(columns, str(path), column, tally)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def read_arrow(path: Path, column: str, tally: Tally) -> Iterator[str]:
    """Yields the texts of an Arrow file, in either of Arrow's two layouts.

    Raises:
        DataError: the file cannot be read, or a row cannot be used.
    """
    refuse_pointer(path, DataError)
    try:
        with pa.memory_map(str(path)) as file:
            batches = _record_batches(file)
            names, columns = next(batches), (batch.column(column) for batch in batches)
            if column not in names:
                raise missing_column(str(path), column, names)
            yield from column_texts(columns, str(path), column, tally)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error})") from None


def _record_batches(file: Any) -> Iterator[Any]:
    """Yields the names of the columns, then the batches."""
    try:
        stream = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        yield whole.schema.names
        yield from (whole.get_batch(number) for number in range(whole.num_record_batches))
        return
    yield stream.schema.names
    yield from stream


def column_texts(columns: Iterable[Any], where: str, column: str, tally: Tally) -> Iterator[str]:
    """Yields the strings of Arrow arrays.

    Args:
        columns: the arrays, one after another.
        where: what holds them, for messages.
        column: its name.
        tally: refuses rows that hold something else, or counts them.

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
                tally.bad_row(error)
            else:
                yield text


def _values(values: Any) -> Iterator[Any]:
    """Yields Python values; bytes where a string is not UTF-8."""
    try:
        yield from values.to_pylist()
    except UnicodeDecodeError:
        for value in values:
            try:
                yield value.as_py()
            except UnicodeDecodeError:
                yield b""
