"""Rows of Arrow tables: texts of one column, or conversations of several."""

from collections.abc import Iterable, Iterator
from typing import Any

from textdiff.data.conversation_rows import row_text
from textdiff.data.document_stream import Omissions


def table_texts(
    batches: Iterable[Any], where: str, column: str, omissions: Omissions
) -> Iterator[str]:
    """Yield the texts, or the conversations, of Arrow batches of the wanted columns.

    Args:
        batches: the batches, one after another.
        where: what holds them, for messages.
        column: name of the text column, or `CONVERSATIONS`.
        omissions: refuses rows that hold something else, or counts them.

    Raises:
        DataError: a row that cannot be used.
    """
    rows = (row for batch in batches for row in _rows(batch))
    for number, row in enumerate(rows, start=1):
        yield omissions.usable(row_text, row, f"{where}, row {number}", column)


def _rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a batch as Python values; bytes where a string is not UTF-8."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        values = [[_value(value) for value in column] for column in batch.columns]
        rows = [
            dict(zip(batch.column_names, row, strict=True)) for row in zip(*values, strict=True)
        ]
    return rows


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b""
