"""Rows of text: the checks that every one of them passes, and an account of those left out."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from textdiff.errors import DataError

EMPTY = "empty or only white space"


@dataclass
class Tally:
    """What one pass over documents leaves out.

    Attributes:
        skip: skip rows that cannot be used instead of refusing them.
        hint: the end of the sentence that refuses one.
        bad_rows: rows that were skipped.
        first: what was wrong with the first of them.
        files: files that were left out, by the reason.
    """

    skip: bool = False
    hint: str = ""
    bad_rows: int = 0
    first: str | None = None
    files: Counter[str] = field(default_factory=Counter)

    def restart(self) -> None:
        """Begins another pass."""
        self.bad_rows, self.first = 0, None
        self.files.clear()

    def bad_row(self, error: DataError) -> None:
        """Counts a row that cannot be used.

        Raises:
            DataError: what `error` says, where such rows are refused.
        """
        if not self.skip:
            raise DataError(f"{error}{self.hint}") from None
        self.bad_rows += 1
        self.first = self.first or str(error)


@dataclass(frozen=True)
class Omissions:
    """What a source leaves out of its documents.

    Attributes:
        files: files by the reason.
        bad_rows: rows that cannot be used, which were skipped on request.
        first_bad_row: what is wrong with the first of them.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    bad_rows: int = 0
    first_bad_row: str | None = None

    @classmethod
    def of(cls, tally: Tally) -> "Omissions":
        """The account of the pass that was made last."""
        return cls(dict(tally.files), tally.bad_rows, tally.first)

    def with_files(self, files: Mapping[str, int]) -> "Omissions":
        """The same with files that were left out before anything was read."""
        return replace(self, files=dict(Counter(self.files) + Counter(files)))

    def sentences(self, name: str) -> list[str]:
        """A line about files and one about rows, where there are any."""
        lines = [f"{name}: left out {files_in_words(self.files)}"] if self.files else []
        if self.bad_rows:
            count = f"{self.bad_rows:,} bad row{'s' if self.bad_rows > 1 else ''}"
            lines.append(f"{name}: skipped {count}, the first one: {self.first_bad_row}")
        return lines


def files_in_words(files: Mapping[str, int]) -> str:
    """Numbers of files with their reasons, the most frequent reason first."""
    total = sum(files.values())
    ranked = sorted(files.items(), key=lambda reason: (-reason[1], reason[0]))
    parts = [f"{why}: {count:,}" for why, count in ranked]
    return f"{total:,} file{'s' if total > 1 else ''} ({', '.join(parts)})"


def no_text(where: str) -> DataError:
    """The error for a file or a data set without any text."""
    return DataError(
        f"{where}: holds no text (it is empty or only white space); give one that holds some"
    )


def blank(where: str) -> DataError:
    """The error for a folder or a pattern of files without any text."""
    return DataError(f"{where}: every document is {EMPTY}; give one that holds text")


def all_bad(where: str, tally: Tally) -> DataError:
    """The error for a source of which nothing is left when bad rows are skipped."""
    return DataError(
        f"{where}: holds no text that can be used: {tally.bad_rows:,} bad rows were skipped, the "
        f"first one: {tally.first}"
    )


def missing_column(where: str, column: str, present: Sequence[str] | Any) -> DataError:
    """The error for a column or key that is not there, listing those that are."""
    names = ", ".join(map(str, present)) or "none"
    return DataError(f"{where}: no column {column!r}; set text_column to one of: {names}")


def text_of(row: Mapping[str, Any], where: str, column: str) -> str:
    """Returns the text of a row.

    Raises:
        DataError: it has none, or something else in its place.
    """
    if column not in row:
        raise missing_column(where, column, row)
    return checked_text(row[column], where, column)


def checked_text(value: object, where: str, column: str) -> str:
    """Returns `value` if it is a string.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} holds {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {column!r} holds half of a surrogate pair, no text") from None
    return value


def parse_json(text: str) -> Any:
    """Returns the value that a JSON text holds; an integer too long for Python is infinite.

    Such an integer is valid JSON and mostly in a key that nobody reads.

    Raises:
        json.JSONDecodeError: the text is not valid JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to convert integers of more than 4300 digits
        return _LENIENT.decode(text)


def _infinite_if_long(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return -math.inf if digits.startswith("-") else math.inf


_LENIENT = json.JSONDecoder(parse_int=_infinite_if_long)


def parse_json_prefix(text: str, start: int) -> tuple[Any, int]:
    """Returns the JSON value that begins at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: there is no valid one.
        RecursionError: it is nested too deeply.
    """
    return _LENIENT.raw_decode(text, start)
