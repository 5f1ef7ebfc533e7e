"""Traces: the steps of a generation, token by token, as JSON lines.

    {"row": 0, "step": 3, "position": 17, "token": 234, "text": " the", "probability": 0.713204,
     "entropy": 1.20341}
    {"row": 0, "step": 4, "position": 17, "remasked": true}

Rows come one after the other and each counts its own steps, so the file does not depend on which
rows shared a batch. Probabilities and entropies are the model's own, before any temperature.
"""

import json
import math
from typing import TextIO

from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.job import Job
from textdiff.sampling.segment import Step
from textdiff.view.cells import Pieces
from textdiff.view.row_steps import RowStep, RowSteps


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
