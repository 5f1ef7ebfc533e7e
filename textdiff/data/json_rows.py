"""Rows of JSON files: a line each, or one after another, or in a list."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from textdiff.data.document_stream import (
    Tally,
    checked_text,
    parse_json,
    parse_json_prefix,
    text_of,
)
from textdiff.data.formats import DAMAGED, kind_of, open_bytes
from textdiff.data.paths import Files
from textdiff.data.utf8 import decode, decoded
from textdiff.errors import DataError

_LONGEST_LINE_BYTES = 1 << 28  # a line is held three times: as bytes, as JSON and as its text
_LONGEST_ROW_CHARACTERS = 1 << 28
_SPACE = " \t\r\n"
_ONE_OBJECT = 'every line has to be an object such as {"text": "..."}'

Line = tuple[int, int, bytes]
"""A line's number, its offset in the file and its bytes."""


def read_lines(path: Path, column: str, tally: Tally) -> Iterator[str]:
    """Yields the texts of a JSON lines file.

    Raises:
        DataError: the file cannot be read, or a line cannot be used.
    """
    for line in _file_lines(path):
        try:
            row = _row(line, str(path))
            text = None if row is None else text_of(row, f"{path}, line {line[0]}", column)
        except DataError as error:
            tally.bad_row(error)
        else:
            if text is not None:
                yield text


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON lines file, each with its place for messages.

    Raises:
        DataError: the file cannot be read, or a line is not a JSON object; with the line's number.
    """
    return _rows(_file_lines(path), str(path))


def stream_rows(file: BinaryIO, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields what `json_rows` would yield of a file with these bytes, called `where`.

    Raises:
        DataError: see `json_rows`.
    """
    return _rows(_lines(file), where)


def _rows(lines: Iterator[Line], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        row = _row(line, name)
        if row is not None:
            yield f"{name}, line {line[0]}", row


def _file_lines(path: Path) -> Iterator[Line]:
    try:
        with open_bytes(path) as file:
            yield from _lines(file)
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _lines(file: BinaryIO) -> Iterator[Line]:
    """Yields lines; of one that is too long, so much that it shows."""
    number = offset = 0
    while line := file.readline(_LONGEST_LINE_BYTES + 1):
        number += 1
        yield number, offset, line
        offset += len(line)
        while not line.endswith(b"\n") and (line := file.readline(_LONGEST_LINE_BYTES + 1)):
            offset += len(line)


def _row(line: Line, name: str) -> dict[str, Any] | None:
    """The object of a line; None for a blank one.

    Raises:
        DataError: it does not hold one.
    """
    number, offset, data = line
    where = f"{name}, line {number}"
    if len(data) > _LONGEST_LINE_BYTES:
        raise DataError(
            f"{where}: longer than {_LONGEST_LINE_BYTES >> 20} MB; give so long a text as a .txt "
            "file, which is read in blocks"
        )
    text = decode(data, name, offset)
    if not text.strip():
        return None
    try:
        row = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); {_ONE_OBJECT}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object; {_ONE_OBJECT}")
    return row


def read_values(path: Path, column: str, tally: Tally) -> Iterator[str]:
    """Yields the texts of a JSON file: of objects one after another, or of a list of objects.

    Raises:
        DataError: the file cannot be read, or an object cannot be used.
    """
    for number, row in enumerate(_values(path), start=1):
        where = f"{path}, row {number}"
        try:
            if not isinstance(row, dict):
                raise DataError(f'{where}: not an object such as {{"text": "..."}}')
            text = text_of(row, where, column)
        except DataError as error:
            tally.bad_row(error)
        else:
            yield text


def holds_column(path: Path, column: str) -> bool:
    """Returns whether the first value of a JSON file is an object with this key.

    Raises:
        DataError: the file cannot be read, or does not hold JSON.
    """
    first = next(_values(path), None)
    return isinstance(first, dict) and column in first


def _values(path: Path) -> Iterator[Any]:
    try:
        with open_bytes(path) as file:
            yield from _Values(decoded(file, str(path)), str(path))
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


class _Values:
    """The values of a JSON text, of which only the one being read is held.

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
        """Passes over white space; the empty string at the end."""
        while True:
            rest = self.text[self.at : self.at + 1]
            if rest and rest not in _SPACE:
                return rest
            if rest:
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
        """Reads so many characters more, if there are any."""
        blocks, size = [self.text[self.at :]], 0
        for block in self.blocks:
            blocks.append(block)
            size += len(block)
            if size >= characters:
                break
        self.text, self.at = "".join(blocks), 0
        return size > 0

    def _invalid(self, why: str) -> DataError:
        return DataError(f"{self.where}, row {max(1, self.number)}: not valid JSON ({why})")


# --- rows of which only a part is scored: a prompt and its text, or a text and its spans ---

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
