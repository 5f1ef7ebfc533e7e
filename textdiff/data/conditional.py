"""Rows of which only a part is scored: a prompt and its text, or a text and its spans."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textdiff.data.files import checked_text, json_rows
from textdiff.errors import DataError


def read_conditional(
    paths: Sequence[str], text_column: str, other_column: str, spans: bool
) -> tuple[list[str], list[Any]]:
    """Reads texts together with what belongs to them from JSON lines files.

    Args:
        paths: .jsonl files, compressed or not.
        text_column: key of the text.
        other_column: key of the prompt, or of a list of [start, end] characters.
        spans: whether it is the latter.

    Returns:
        The texts, and their prompts (str) or spans (lists of (start, end)). Rows without text are
        left out.

    Raises:
        DataError: another kind of file, or a row that lacks a key or holds something else.
    """
    texts: list[str] = []
    others: list[Any] = []
    for name in paths:
        path = Path(name)
        if ".jsonl" not in path.name.lower():
            raise DataError(f"{name}: prompts and spans are read from .jsonl files only")
        if not path.is_file():
            raise DataError(f"{name}: no such file; check the path")
        for where, row in json_rows(path):
            for column in (text_column, other_column):
                if column not in row:
                    raise DataError(
                        f"{where}: no key {column!r}; it has {', '.join(row) or 'none'}"
                    )
            text = checked_text(row[text_column], where, text_column)
            value = row[other_column]
            other = _spans(value, where) if spans else checked_text(value, where, other_column)
            if text:
                texts.append(text)
                others.append(other)
    if not texts:
        raise DataError(f"{', '.join(paths)}: holds no text")
    return texts, others


def _spans(value: object, where: str) -> list[tuple[int, int]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: spans must be a list of [start, end], not {value!r:.60}")
    for pair in value:
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(x) is int for x in pair)
        if not whole:
            raise DataError(f"{where}: a span must be [start, end] in characters, not {pair!r:.60}")
    return [(start, end) for start, end in value]
