"""The steps of a job as the rows see them: one after another, each with what changed in it alone.

The steps of a row do not depend on its batch, so they are counted by row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from textdiff.sampling.job import Job
from textdiff.sampling.segment import Step


@dataclass(frozen=True)
class RowStep:
    """State of one row after a network call that changed it.

    Attributes:
        row: its place in the job.
        number: how many calls have changed it, this one included.
        time: noise time before the step, from 1 to 0.
        ids: its tokens up to the end of the segment that is being written.
        draft: the same with open positions filled by their likeliest tokens, if that was asked for.
        final: tokens that were final before the segment.
        confidence: probability of the new token at each position that got one; NaN if unknown.
        entropy: nats at these positions; NaN if unknown.
        remasked: positions that were masked again since its last step.
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
        lost: positions of each row that were masked again since its last step.
    """

    mask: int
    numbers: list[int] = field(default_factory=list)
    lost: list[set[int]] = field(default_factory=list)

    def begin(self, job: Job) -> None:
        """Turn to another job."""
        self.numbers = [0] * len(job.prompts)
        self.lost = [set() for _ in job.prompts]

    def split(self, step: Step) -> Iterator[RowStep]:
        """Yield the rows that got a token, in the job's order.

        A call for other rows can mask tokens of a row again; it sees them with its own next call,
        as it does alone.
        """
        assert step.final is not None
        assert step.ends is not None
        width = step.canvas.shape[1]
        rows, positions = step.changed // width, step.changed % width
        confidence, entropy = (_known(x, rows) for x in (step.confidence, step.entropy))
        dependence = step.dependence
        for row in sorted(set(rows.tolist())):
            own = rows == row
            end = int(step.ends[row])
            ids = step.canvas[row, :end].tolist()
            here = positions[own].tolist()
            new = [at for at in here if ids[at] != self.mask]
            self.lost[row] = (self.lost[row] | set(here)) - set(new)
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
