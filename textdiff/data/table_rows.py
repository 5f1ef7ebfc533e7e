"""Rows of Arrow tables: texts of one column, or conversations of several."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from textdiff.data.conversation_rows import CONVERSATIONS, conversation_texts
from textdiff.data.document_stream import Omissions, checked_text


def table_texts(
    batches: Iterable[Any], where: str, column: str, omissions: Omissions
) -> Iterator[str]:
    """Yield the texts, or the conversations, of Arrow batches of the wanted columns."""
    if column == CONVERSATIONS:
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        return conversation_texts(rows, where, omissions)
    return column_texts((batch.column(0) for batch in batches), where, column, omissions)


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
    values = (value for array in columns for value in _values(array))
    for row, value in enumerate(values, start=1):
        yield omissions.usable(checked_text, value, f"{where}, row {row}", column)


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
