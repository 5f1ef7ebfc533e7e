"""Rows of a job in their slots: which wait, which are active, and how far each is."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.sampling.job import Job


@dataclass
class Rows:
    """Rows that wait or are active, and how far each is.

    Attributes:
        job: what is to be generated.
        slots: rows that are active together, at most.
        waiting: rows that have not begun, in order.
        active: the row in each slot.
        final: [R] tokens of each row that will not change.
        passed: [R] segments that each row has finished.
        done: [R] bool, rows that are as long as they become.
    """

    job: Job
    slots: int
    waiting: deque[int]
    active: list[int]
    final: Tensor
    passed: Tensor
    done: Tensor

    @classmethod
    def of(cls, job: Job, slots: int | None) -> "Rows":
        """Return rows that all wait."""
        count = len(job.prompts)
        final = job.onwards[:, 0].clone()
        room = count if slots is None else max(1, min(slots, count))
        done = torch.zeros(count, dtype=torch.bool)
        return cls(job, room, deque(range(count)), [], final, torch.zeros_like(final), done)

    @property
    def unfinished(self) -> bool:
        """Whether a row is active or waits."""
        return bool(self.active or self.waiting)

    def admit(self) -> list[int]:
        """Give free slots to waiting rows; return these rows."""
        new = [
            self.waiting.popleft()
            for _ in range(min(len(self.waiting), self.slots - len(self.active)))
        ]
        self.active += new
        return new

    def advance(self, ends: Tensor, text: Tensor) -> list[int]:
        """Note that the active rows have finished their segments, up to `ends`.

        Returns:
            Slots whose rows are done: as long as wanted, or with an end in their open end.
        """
        active = torch.tensor(self.active)
        tails = self.job.tails[active]
        fresh = ends - torch.maximum(self.final[active], tails)
        self.final[active] = ends = self.job.onwards[active, ends]
        self.passed[active] += 1
        done = (ends >= self.job.lengths[active]).tolist()
        if self.job.ended is not None:
            tokens = text[on_device(text, active)].tolist()  # one synchronisation per segment
            spans = zip(tails.tolist(), ends.tolist(), fresh.tolist(), strict=True)
            for slot, (tail, end, new) in enumerate(spans):
                done[slot] = done[slot] or (new > 0 and self.job.ended(tokens[slot][tail:end], new))
        gone = [slot for slot, is_done in enumerate(done) if is_done]
        self.done[[self.active[slot] for slot in gone]] = True
        return gone

    def leave(self, slots: list[int]) -> list[int]:
        """Free slots; the last rows move into the gaps.

        Returns:
            The former slot of each row that stays.
        """
        gone = set(slots)
        staying = [slot for slot in range(len(self.active)) if slot not in gone]
        order = list(range(len(staying)))
        moving = [slot for slot in staying if slot >= len(staying)]
        for gap in sorted(gone.intersection(order)):
            order[gap] = moving.pop()
        self.active = [self.active[slot] for slot in order]
        return order


def on_device(like: Tensor, index: Tensor | Sequence[int]) -> Tensor:
    """Return an index on the device of the tensor that it is for."""
    return torch.as_tensor(index, dtype=torch.int64).to(like.device)
