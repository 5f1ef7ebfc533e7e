"""Rows of JSON files: a line each, or one after another, or in a list.

The parsers of pyarrow and datasets infer types over blocks of rows: one odd row changes others. An
error of theirs does not name a line. Here one row is read at a time.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from textdiff.data.conversation_rows import row_text
from textdiff.data.document_stream import Omissions, checked_text
from textdiff.data.formats import decode, decoded, kind_of_file, opened
from textdiff.data.paths import Files
from textdiff.data.plain_data import parse_json_prefix, parse_json_row
from textdiff.errors import DataError

_LONGEST_LINE_BYTES = 1 << 28  # a line is held three times: as bytes, as JSON and as its text
_LONGEST_ROW_CHARACTERS = 1 << 28
_SPACE = " \t\r\n"
_ONE_OBJECT = 'every line has to be an object such as {"text": "..."}'

Line = tuple[int, int, bytes]
"""A line's number, its offset in the file and its bytes."""

Row = tuple[str, dict[str, Any]]
"""Name of a row in messages, and the row."""


def read_lines(path: Path, column: str, omissions: Omissions) -> Iterator[str]:
    """Yield the texts of a JSON lines file.

    Raises:
        DataError: the file cannot be read, or a line cannot be used.
    """
    with opened(path) as file:
        for line in _lines(file):
            yield omissions.usable(_text, line, str(path), column)


def _text(line: Line, name: str, column: str) -> str:
    row = _row(line, name)
    return "" if row is None else row_text(row, f"{name}, line {line[0]}", column)


def rows_of(files: Files) -> Iterator[Row]:
    """Yield the objects of JSON lines files.

    Raises:
        DataError: another kind of file, or a line that is not a JSON object; with its number.
    """
    for path in files.paths:
        if kind_of_file(path) != "lines":
            raise DataError(
                f"{path}: prompts and spans are read from .jsonl files only", code="not_json_lines"
            )
        with opened(path) as file:
            yield from stream_rows(file, str(path))


def stream_rows(file: BinaryIO, name: str) -> Iterator[Row]:
    """Yield the objects of JSON lines.

    Raises:
        DataError: see `rows_of`.
    """
    for line in _lines(file):
        row = _row(line, name)
        if row is not None:
            yield f"{name}, line {line[0]}", row


def _lines(file: BinaryIO) -> Iterator[Line]:
    """Yield lines; of one that is too long, only enough to see that it is."""
    number = offset = 0
    while line := file.readline(_LONGEST_LINE_BYTES + 1):
        number += 1
        yield number, offset, line
        offset += len(line)
        while not line.endswith(b"\n") and (line := file.readline(_LONGEST_LINE_BYTES + 1)):
            offset += len(line)


def _row(line: Line, name: str) -> dict[str, Any] | None:
    """Return the object of a line; None for a blank one.

    Raises:
        DataError: it does not hold an object.
    """
    number, offset, data = line
    where = f"{name}, line {number}"
    if len(data) > _LONGEST_LINE_BYTES:
        raise DataError(
            f"{where}: longer than {_LONGEST_LINE_BYTES >> 20} MB; give so long a text as a .txt "
            "file, which is read in blocks",
            code="long_line",
        )
    text = decode(data, name, offset)
    if not text.strip():
        return None
    try:
        row = parse_json_row(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not valid JSON ({error}); {_ONE_OBJECT}", code="not_json"
        ) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object; {_ONE_OBJECT}", code="not_object")
    return row


# --- JSON files that are not lines ---------------------------------------------------------------


def read_values(path: Path, column: str, omissions: Omissions) -> Iterator[str]:
    """Yield the texts of a JSON file: of objects one after another, or of a list of objects.

    Raises:
        DataError: the file cannot be read, or an object cannot be used.
    """
    for number, row in enumerate(json_values(path), start=1):
        yield omissions.usable(row_text, row, f"{path}, row {number}", column)


def json_values(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON file.

    Raises:
        DataError: the file cannot be read, or does not hold JSON.
    """
    with opened(path) as file:
        yield from _Values(decoded(file, str(path)), str(path))


class _Values:
    """Values of a JSON text, of which only the current one is held.

    Args:
        blocks: the text.
        where: its name for messages.
    """

    def __init__(self, blocks: Iterator[str], where: str) -> None:
        self.blocks, self.where = blocks, where
        self.text, self.at, self.number = "", 0, 0

    def __iter__(self) -> Iterator[Any]:
        listed = self._next_character() == "["
        self.at += listed
        while (character := self._next_character()) not in ("", "]" if listed else ""):
            if listed and self.number:
                if character != ",":
                    raise self._invalid(f"expecting ',' and not {character!r}")
                self.at += 1
                self._next_character()
            self.number += 1
            yield self._value()
        if listed:
            if not self._next_character():
                raise self._invalid("the list does not end")
            self.at += 1
            if self._next_character():
                raise self._invalid("more follows after the list")

    def _next_character(self) -> str:
        """Pass over white space; the empty string at the end."""
        while True:
            character = self.text[self.at : self.at + 1]
            if character and character not in _SPACE:
                return character
            if character:
                self.at += 1
            elif not self._read(1):
                return ""

    def _value(self) -> Any:
        while True:
            try:
                value, end = parse_json_prefix(self.text, self.at)
                if end < len(self.text):  # else a number may go on
                    self.at = end
                    return value
                problem = ""
            except (ValueError, RecursionError) as error:
                value, end, problem = None, self.at, str(error)
            if len(self.text) - self.at > _LONGEST_ROW_CHARACTERS:
                raise self._invalid("a value is longer than 256 MB")
            # Twice as much each time: a long value is not parsed over and over.
            if not self._read(len(self.text) - self.at):
                if problem:
                    raise self._invalid(problem)
                self.at = end
                return value

    def _read(self, characters: int) -> bool:
        """Read so many characters more, if there are any."""
        blocks, size = [self.text[self.at :]], 0
        for block in self.blocks:
            blocks.append(block)
            size += len(block)
            if size >= characters:
                break
        self.text, self.at = "".join(blocks), 0
        return size > 0

    def _invalid(self, why: str) -> DataError:
        where = f"{self.where}, row {max(1, self.number)}"
        return DataError(f"{where}: not valid JSON ({why})", code="not_json")


# --- rows of which only a part is scored: a prompt and its text, or a text and its spans ---------


def read_conditional(
    rows: Iterable[Row], text_column: str, other_column: str, spans: bool
) -> Iterator[tuple[str, Any]]:
    """Yield texts together with what belongs to them; rows without text are left out.

    Args:
        rows: their places and contents.
        text_column: key of the text.
        other_column: key of the prompt, or of a list of [start, end] characters.
        spans: whether it is the latter.

    Raises:
        DataError: a row that lacks a key or holds something else.
    """
    for where, row in rows:
        for column in (text_column, other_column):
            if column not in row:
                raise DataError(
                    f"{where}: no key {column!r}; it has {', '.join(row) or 'none'}",
                    code="no_column",
                )
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
