"""Results of a file of prompts: a file that outlives interruptions, or a stream.

    OUT                    finished rows, in order, from the first on
    OUT.job/job.json       what the job is: it goes on only as what it was begun
    OUT.job/rows-0.jsonl   rows that process 0 has finished, in the order in which it did

Rows are appended, line by line, so a killed job has lost at most the line that it was writing.
Processes share nothing but this folder; the first one moves their rows to OUT. When all are there
the rows' files are deleted, and job.json stays as the record of what made OUT.

Rows are divided into groups by the job alone: neither by what is finished, nor by the number of
processes. An interrupted group is generated again, and only missing rows are kept. So every row has
the same rows beside it in its network calls. A resumed job gives what an uninterrupted one gives,
down to the last rounding.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from textdiff.batch.lines import OutputRow
from textdiff.errors import ConfigError, DataError, TextDiffError
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.request import Request
from textdiff.storage import whole_file

JOB = "job.json"


class Output:
    """Output of a job, in one of its processes.

    Args:
        path: OUT.
        rows: rows of the job.
        rank: number of the process; number 0 writes OUT.
    """

    def __init__(self, path: Path, rows: int, rank: int = 0):
        self.path, self.rows, self.rank = path, rows, rank
        self.folder = path.with_name(path.name + ".job")
        self.done: set[int] = set()
        self.written = 0
        self._waiting: dict[int, str] = {}  # finished rows that are not in OUT yet, by number
        self._read: dict[Path, int] = {}  # bytes of each file of rows that were read
        self._file_of_rows: TextIO | None = None

    def prepare(self, job: Mapping[str, Any]) -> None:
        """Begin the job, or check that it is the one that was begun; for process 0.

        Args:
            job: all that the output depends on.

        Raises:
            ConfigError: OUT belongs to another job, or to none.
            DataError: it cannot be written.
        """
        record = self.folder / JOB
        try:
            if record.exists():
                self._compare(json.loads(record.read_text(encoding="utf-8")), job)
            elif self.path.exists():
                raise ConfigError(
                    f"--output {self.path} exists, and no job is known that wrote it; choose "
                    "another, or move it away"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                with whole_file(record) as file:
                    file.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
            for written in [self.path, *self._files()]:
                _cut_torn_line(written)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise DataError(f"--output {self.path} cannot be used: {reason}") from None

    def _compare(self, begun: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(job))
        for key in now:
            if begun.get(key) != now[key]:
                raise ConfigError(
                    f"--output {self.path} was begun with {key} {json.dumps(begun.get(key))}, now "
                    f"it is {json.dumps(now[key])}; go on as it was begun, or choose another output"
                )

    def load(self) -> None:
        """Read which rows are finished; after `prepare`, before any process writes."""
        if self.path.exists():
            with self.path.open("rb") as file:
                self.written = sum(1 for _ in file)
        self.done = set(range(self.written))
        self._collect()

    def __enter__(self) -> "Output":
        """Open the rows' file; after every process has loaded."""
        self._file_of_rows = self._file(self.rank).open("a", encoding="utf-8")
        self.advance()
        return self

    def __exit__(self, *error: object) -> None:
        """Delete the files that were only needed to go on, if all rows are there; in process 0."""
        assert self._file_of_rows is not None
        self._file_of_rows.close()
        if self.rank == 0 and self.complete:
            for file in self._files():
                file.unlink()

    @property
    def complete(self) -> bool:
        """True where OUT has all rows."""
        return self.written == self.rows

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the records of OUT that have no text."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                if "error" in record:
                    yield record

    def write(self, row: int, line: str) -> None:
        """Keep a finished row."""
        if row in self.done:
            return
        assert self._file_of_rows is not None
        self._file_of_rows.write(json.dumps([row, line], ensure_ascii=False) + "\n")
        self._file_of_rows.flush()
        self.done.add(row)
        self.advance()

    def advance(self) -> None:
        """Move finished rows to OUT, as far as no row before them is missing; in process 0."""
        if self.rank:
            return
        self._collect()
        with self.path.open("a", encoding="utf-8") as file:
            while self.written in self._waiting:
                file.write(self._waiting.pop(self.written))
                self.written += 1

    def _file(self, rank: int) -> Path:
        return self.folder / f"rows-{rank}.jsonl"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rows-*.jsonl"))

    def _collect(self) -> None:
        """Read whole lines that are new in the files of rows."""
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(new)
            for words in new.splitlines():
                row, line = json.loads(words)
                self.done.add(row)
                if row >= self.written:
                    self._waiting[row] = line


class StreamOutput(Output):
    """An output without a file: a job that is interrupted begins anew.

    Args:
        file: where lines go, as UTF-8.
        name: what to call it.
        rows: rows of the job.
    """

    def __init__(self, file: BinaryIO, name: str, rows: int):
        super().__init__(Path(name), rows)
        self._lines = file
        self._failures: list[dict[str, Any]] = []

    def prepare(self, job: Mapping[str, Any]) -> None:
        """Do nothing: no other process writes here."""

    def load(self) -> None:
        """Do nothing: no row is finished."""

    def __enter__(self) -> "StreamOutput":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: lines are written as they come."""

    def failures(self) -> Iterator[dict[str, Any]]:
        """Yield the records of rows without a text."""
        yield from self._failures

    def write(self, row: int, line: str) -> None:
        """Take a finished row, and write all rows that are next."""
        if row in self.done:
            return
        self.done.add(row)
        self._waiting[row] = line
        self.advance()

    def advance(self) -> None:
        """Write finished rows as far as no row before them is missing."""
        while self.written in self._waiting:
            line = self._waiting.pop(self.written)
            record = json.loads(line)
            if "error" in record:
                self._failures.append(record)
            self._lines.write(line.encode())
            self._lines.flush()
            self.written += 1


def _cut_torn_line(path: Path) -> None:
    """Remove a last line that was not written to its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


Group = list[int]
"""Rows of the output that are generated together."""


def groups(rows: Sequence[OutputRow], size: int) -> list[Group]:
    """Return usable rows in groups of so many and of equal options, similar lengths together."""
    alike: dict[str, Group] = {}
    for number, row in enumerate(rows):
        if row.request is not None:
            alike.setdefault(repr(row.request.config), []).append(number)
    result = [all_[at : at + size] for all_ in alike.values() for at in range(0, len(all_), size)]
    lengths = [0 if row.request is None else int(row.request.job.lengths[0]) for row in rows]
    return sorted((sorted(group, key=lengths.__getitem__) for group in result), key=min)


def fill(
    model: TextDiffusion,
    rows: Sequence[OutputRow],
    output: Output,
    *,
    batch_size: int,
    share: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    """Write every row that is missing and falls to this process.

    Args:
        model: generates.
        rows: all rows of the job.
        output: where they go; ready to write.
        batch_size: rows per network call.
        share: number of this process, and how many there are.
        progress: gets, with every row, how many are done and how many tokens this one has.
    """
    rank, count = share
    for number, row in list(enumerate(rows))[rank::count]:
        if row.error is not None:
            output.write(number, row.failed(row.error))
    # Rows of models in blocks leave and enter one by one, and want others that wait.
    size = batch_size * (1 if model.family.block_size is None else 4)
    for group in groups(rows, size)[rank::count]:
        if output.done.issuperset(group):
            continue
        keeper = _Keeper([rows[number] for number in group], group, output, progress)
        requests = [row.request for row in keeper.rows if row.request is not None]
        try:
            model.run(Request.joined(requests), batch_size, [keeper])
        except TextDiffError as error:  # of options, which these rows share
            for number in group:
                output.write(number, rows[number].failed(str(error)))


@dataclass(eq=False)
class _Keeper(Callback):
    """Writer of the rows of a group, as soon as they are done."""

    rows: Sequence[OutputRow]
    group: Group
    output: Output
    progress: Callable[[int, int], None]

    def finished(self, row: int, result: FinishedRow) -> None:
        self.output.write(self.group[row], self.rows[row].answered(result))
        self.progress(len(self.output.done), result.new_tokens)
