"""Recorders of a generation, step by step: a trace and a film.

A row's steps are counted by row, so files do not depend on which rows shared a batch. A trace is
JSON lines, row by row; probabilities and entropies are the model's own, before any temperature:

    {"row": 0, "step": 3, "position": 17, "token": 234, "text": " the", "probability": 0.713204,
     "entropy": 1.20341}
    {"row": 0, "step": 4, "position": 17, "remasked": true}

A film is one HTML file that plays anywhere, offline. It holds the first picture of each row and the
changes of every step. It loads nothing, and text is escaped where it is shown.
"""

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.job import Job
from textdiff.sampling.step import Step
from textdiff.view.cells import Cell, Kind, Pieces, Reader


@dataclass(frozen=True)
class RowStep:
    """State of one row after a network call that changed it.

    Attributes:
        row: its place in the job.
        number: how many calls have changed it, this one included.
        time: noise time before the step, from 1 to 0.
        ids: its tokens up to the end of the segment that is written, masks for renewed noise.
        draft: the same with open positions filled by their likeliest tokens, if that was asked for.
        final: tokens that were final before the segment.
        confidence: probability of the new token at each position that got one; NaN if unknown.
        entropy: nats at these positions; NaN if unknown.
        remasked: positions that were masked or noised again since its last step.
        dependence: nats that revealing these positions at once may cost; None if unknown.
    """

    row: int
    number: int
    time: float
    ids: list[int]
    draft: list[int] | None
    final: int
    confidence: dict[int, float]
    entropy: dict[int, float]
    remasked: list[int]
    dependence: float | None


@dataclass
class RowSteps:
    """Splitter of a job's steps into those of its rows.

    Attributes:
        mask: id of the mask token.
        numbers: steps of each row of the present job so far.
        held: positions of each row that have got a token.
        lost: those that were masked or noised again since its last step.
    """

    mask: int
    numbers: list[int] = field(default_factory=list)
    held: list[set[int]] = field(default_factory=list)
    lost: list[set[int]] = field(default_factory=list)

    def begin(self, job: Job) -> None:
        """Turn to another job."""
        self.numbers = [0] * len(job.prompts)
        self.held, self.lost = [set() for _ in job.prompts], [set() for _ in job.prompts]

    def split(self, step: Step) -> Iterator[RowStep]:
        """Yield the rows that got a token, in the job's order.

        A call for other rows can mask tokens of a row again; it sees them with its own next call,
        as it does alone.
        """
        assert step.final is not None
        assert step.ends is not None
        width = step.canvas.shape[1]
        rows, positions = step.changed // width, step.changed % width
        canvas = step.without_noise(self.mask)
        confidence, entropy = (_known(x, rows) for x in (step.confidence, step.entropy))
        dependence = step.dependence
        for row in sorted(set(rows.tolist())):
            own = rows == row
            end = int(step.ends[row])
            ids = canvas[row, :end].tolist()
            here = positions[own].tolist()
            new = [at for at in here if ids[at] != self.mask]
            self.lost[row] = (self.lost[row] | self.held[row] & set(here)) - set(new)
            self.held[row] = self.held[row] - set(here) | set(new)
            if not new:
                continue
            lost, self.lost[row] = self.lost[row], set()
            sure = dict(zip(here, confidence[own].tolist(), strict=True))
            nats = dict(zip(here, entropy[own].tolist(), strict=True))
            self.numbers[row] += 1
            yield RowStep(
                row=row,
                number=self.numbers[row],
                time=float(step.t[row]),
                ids=ids,
                draft=None if step.draft is None else step.draft[row, :end].tolist(),
                final=int(step.final[row]),
                confidence={at: sure[at] for at in new},
                entropy={at: nats[at] for at in new},
                remasked=sorted(lost),
                dependence=None if dependence is None else float(dependence[row]),
            )


def given_of(prompt: Sequence[int | None], mask: int) -> tuple[list[int], set[int]]:
    """Return a prompt's tokens, with masks where text is generated, and its fixed positions."""
    given = {at for at, token in enumerate(prompt) if token is not None}
    return [mask if token is None else token for token in prompt], given


def _known(values: Tensor | None, rows: Tensor) -> Tensor:
    """Return values of the changed positions, NaN where they were not asked for."""
    if values is not None:
        return values
    return torch.full(rows.shape, math.nan, dtype=torch.float64)


class Trace(Callback):
    """Writer of rows, each when it and those before it are done.

    Args:
        file: where to write.
        pieces: decodes tokens.
        mask: id of the mask token.
    """

    parts = ("confidence", "entropy")

    def __init__(self, file: TextIO, pieces: Pieces, mask: int):
        self.file, self.pieces, self.steps = file, pieces, RowSteps(mask)
        self.lines: list[list[str]] = []
        self.done: set[int] = set()
        self.written = 0

    def begin(self, job: Job) -> None:
        """Make room for the rows."""
        self.steps.begin(job)
        self.keys = job.row_keys
        self.lines, self.done, self.written = [[] for _ in self.keys], set(), 0

    def step(self, step: Step) -> None:
        """Note what changed."""
        for change in self.steps.split(step):
            self.lines[change.row] += self._lines(change)

    def finished(self, row: int, result: FinishedRow) -> None:
        """Write the rows whose turn it is."""
        self.done.add(row)
        while self.written in self.done:
            self._write()
        self.file.flush()

    def close(self) -> None:
        """Write rows that were not finished, as far as they came."""
        while self.written < len(self.lines):
            self._write()
        self.file.flush()

    def _write(self) -> None:
        self.file.writelines(self.lines[self.written])
        self.lines[self.written] = []
        self.written += 1

    def _lines(self, change: RowStep) -> list[str]:
        where: dict[str, object] = {"row": self.keys[change.row][1], "step": change.number}
        records: list[dict[str, object]] = [
            where
            | {"position": at, "token": change.ids[at], "text": self.pieces([change.ids[at]])[0]}
            | {"probability": _figure(chance), "entropy": _figure(change.entropy[at])}
            for at, chance in change.confidence.items()
        ]
        records += [where | {"position": at, "remasked": True} for at in change.remasked]
        return [json.dumps(record, ensure_ascii=False) + "\n" for record in records]


def _figure(value: float) -> float | None:
    """Return six significant digits, all that float32 keeps between batches; null: unknown."""
    return None if math.isnan(value) else float(f"{value:.6g}")


KINDS = tuple(Kind)
"""Kinds by the number that they have in the file; fresh ones are stored as `kept`."""


class Film(Callback):
    """Recorder of rows, which writes the file when it is closed.

    Args:
        path: the file.
        reader: makes cells of tokens.
        title: heading of the page.
        facts: names and values that the page shows below it.
    """

    parts = ("draft", "confidence", "entropy")

    def __init__(self, path: Path, reader: Reader, title: str, facts: dict[str, str]):
        self.path, self.reader, self.title, self.facts = path, reader, title, facts
        self.steps = RowSteps(reader.mask)
        self.strings: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.begun: list[dict[str, Any]] = []  # those of the present job
        self.shown: list[list[Cell]] = []
        self.given: list[set[int]] = []

    def begin(self, job: Job) -> None:
        """Record the prompts."""
        self.steps.begin(job)
        starts = [given_of(prompt, self.reader.mask) for prompt in job.prompts]
        self.given = [given for _, given in starts]
        self.shown = [[] for _ in job.prompts]
        self.begun = [
            {"index": index, "frames": [], "finished": False} for _, index in job.row_keys
        ]
        for number, (ids, given) in enumerate(starts):
            cells = self.reader.cells(ids, None, given, (), ())
            self.begun[number]["start"] = self._changes(number, cells)
        self.rows += self.begun

    def step(self, step: Step) -> None:
        """Record what changed."""
        for change in self.steps.split(step):
            self.begun[change.row]["frames"].append(self._frame(change))

    def finished(self, row: int, result: FinishedRow) -> None:
        """Mark a row that was filmed to its end."""
        self.begun[row]["finished"] = True

    def close(self) -> None:
        """Write the file."""
        data = {
            "kinds": list(KINDS),
            "facts": self.facts,
            "strings": list(self.strings),
            "rows": sorted(self.rows, key=lambda row: int(row["index"])),
        }
        page = files("textdiff.view").joinpath("film.html").read_text(encoding="utf-8")
        page = page.replace("__TITLE__", html.escape(self.title))
        self.path.write_text(page.replace("__FILM__", _script_safe(data)), encoding="utf-8")

    def _frame(self, change: RowStep) -> dict[str, Any]:
        """Return the changes of a step: cells, new tokens with their figures, and masked ones.

        Confidences are in thousandths, entropies in hundredths of a nat; -1 is unknown.
        """
        cells = self.reader.cells(
            change.ids, change.draft, self.given[change.row], (), change.remasked
        )
        frame: dict[str, Any] = {
            "time": round(change.time, 4),
            "cells": self._changes(change.row, cells),
            "news": [
                number
                for at, chance in change.confidence.items()
                for number in (at, _whole(chance, 1000), _whole(change.entropy[at], 100))
            ],
        }
        if change.dependence is not None:
            frame["nats"] = round(change.dependence, 3)
        return frame

    def _changes(self, row: int, cells: Sequence[Cell]) -> list[int]:
        """Return position, string and kind of each cell that has changed."""
        before, self.shown[row] = self.shown[row], list(cells)
        numbers: list[int] = []
        for at, cell in enumerate(cells):
            if at >= len(before) or before[at] != cell:
                string = self.strings.setdefault(cell.text, len(self.strings))
                numbers += [at, string, KINDS.index(cell.kind)]
        return numbers


def _whole(value: float, parts: int) -> int:
    return -1 if math.isnan(value) else round(value * parts)


def _script_safe(data: dict[str, Any]) -> str:
    """Return JSON that cannot end the script element around it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
