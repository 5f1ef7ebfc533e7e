"""A generation as a film: one HTML file that plays anywhere, offline.

The file holds, for each row, what its first picture shows and what every step changed in it. It
loads nothing, and text is escaped where it is shown.
"""

import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.job import Job
from textdiff.sampling.segment import Step
from textdiff.view.cells import Cell, Kind, Reader
from textdiff.view.row_steps import RowStep, RowSteps, given_of

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
