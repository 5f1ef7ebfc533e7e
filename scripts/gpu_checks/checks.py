"""Lines of a check: a difference with its limit, a figure, a part left out, or an error."""

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import textdiff

PACKAGE = Path(textdiff.__file__).resolve().parent


@dataclass(frozen=True)
class Check:
    """One line of the output.

    Attributes:
        name: what was compared.
        found: the difference; None where it did not run.
        limit: the largest difference that passes.
        note: why it did not run, or what went wrong.
        skipped: it could not run here, which is not a failure.
    """

    name: str
    found: float | None
    limit: float
    note: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Within the limit; NaN is not."""
        return self.skipped or (self.found is not None and self.found <= self.limit)


Checks = Iterator[Check]
Stage = Callable[[torch.device, Path], Checks]


def figure(name: str, value: float, unit: str) -> Check:
    """Return a measurement, which cannot fail."""
    return Check(name, value, math.inf, unit)


def difference(value: Tensor, reference: Tensor) -> float:
    """Return |value - reference| / |reference|."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def contained(name: str, checks: Checks) -> Checks:
    """Yield checks; an error between them is the last one, and has failed."""
    try:
        yield from checks
    except Exception as error:
        yield Check(name, None, 0.0, first_line(error) + place_of(error))


def first_line(error: Exception) -> str:
    """Return the first line of an error, after its type; some go on for pages."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def place_of(error: Exception) -> str:
    """Return the last line of textdiff's code that an error passed; empty: it passed none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if PACKAGE in Path(frame.filename).parents:
            return f" ({short_place(frame.filename, frame.lineno)})"
    return ""


def short_place(file: str, line: int | None) -> str:
    """Return a line of a file, by its last two names."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"
