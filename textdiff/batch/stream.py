"""Results that go to a stream as they finish, in the order of the input, and are not kept."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from textdiff.batch.output import Output


class StreamOutput(Output):
    """An output without a file: a job that is interrupted begins anew.

    Args:
        file: where lines go, as UTF-8.
        name: what to call it.
        rows: rows of the whole job.
    """

    def __init__(self, file: BinaryIO, name: str, rows: int):
        super().__init__(Path(name), rows)
        self._lines = file
        self._failures: list[dict[str, Any]] = []

    def prepare(self, job: Mapping[str, Any]) -> None:
        """Does nothing: nobody else writes here."""

    def load(self) -> None:
        """Does nothing: no row is finished."""

    def __enter__(self) -> "StreamOutput":
        return self

    def __exit__(self, *error: object) -> None:
        """Does nothing: lines are written as they come."""

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yields the records of rows without a text."""
        yield from self._failures

    def write(self, row: int, line: str) -> None:
        """Takes a finished row, and writes all rows that are next."""
        if row in self.done:
            return
        self.done.add(row)
        self._waiting[row] = line
        self.advance()

    def advance(self) -> None:
        """Writes finished rows as far as no row before them is missing."""
        while self.written in self._waiting:
            line = self._waiting.pop(self.written)
            record = json.loads(line)
            if "error" in record:
                self._failures.append(record)
            self._lines.write(line.encode())
            self._lines.flush()
            self.written += 1
