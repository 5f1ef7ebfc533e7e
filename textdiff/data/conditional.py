"""Rows of which only a part is scored: a prompt and its text, or a text and its spans."""

from collections.abc import Iterable, Iterator
from typing import Any

from textdiff.data.formats import kind_of
from textdiff.data.jsons import json_rows
from textdiff.data.paths import Files
from textdiff.data.rows import checked_text
from textdiff.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for messages, and the row."""


def rows_of(files: Files) -> Iterator[Row]:
    """Yields the rows of JSON lines files.

    Raises:
        DataError: another kind of file, or a line that is not an object.
    """
    for path in files.paths:
        if kind_of(path) != "lines":
            raise DataError(f"{path}: prompts and spans are read from .jsonl files only")
        yield from json_rows(path)


def read_conditional(
    rows: Iterable[Row], text_column: str, other_column: str, spans: bool
) -> Iterator[tuple[str, Any]]:
    """Yields texts together with what belongs to them; rows without text are left out.

    Args:
        rows: where they stand, and what they hold.
        text_column: key of the text.
        other_column: key of the prompt, or of a list of [start, end] characters.
        spans: whether it is the latter.

    Raises:
        DataError: a row that lacks a key or holds something else.
    """
    for where, row in rows:
        for column in (text_column, other_column):
            if column not in row:
                raise DataError(f"{where}: no key {column!r}; it has {', '.join(row) or 'none'}")
        text = checked_text(row[text_column], where, text_column)
        value = row[other_column]
        other = _spans(value, where) if spans else checked_text(value, where, other_column)
        if text:
            yield text, other


def _spans(value: object, where: str) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: spans must be a list of [start, end], not {value!r:.60}")
    for pair in value:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not whole:
            raise DataError(f"{where}: a span must be [start, end] in characters, not {pair!r:.60}")
    return [(start, end) for start, end in value]
