"""Jobs: rows to generate, their segments, which are finished one after another, and their slots.

| model | a row's next segment | what it sees before |
|---|---|---|
| in blocks | the block of its first unfinished token | all finished blocks, or a window of them |
| full sequence | all of the row that the context holds, at first | that itself |
| full sequence, longer rows | a stride more | the end of what is finished, as context allows |
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.models.devices import Readback


@dataclass(frozen=True)
class Job:
    """Rows to generate.

    Attributes:
        prompts: token ids that are given of each row (may be empty); None where a place among them
            is open.
        new_tokens: open places that follow these in each row: tokens to generate, at most.
        first_row: index of the first row in a larger job; seeds depend on it, batches do not.
        seed: seed of the job.
        ended: test of the tokens of a row's open end after every segment, so many of them from this
            segment: whether they end the text. None: rows end at `new_tokens` alone.
        keys: (seed, index) of each row, for rows that come from different jobs; None: they have
            `seed` and follow `first_row`.
    """

    prompts: Sequence[Sequence[int | None]]
    new_tokens: Sequence[int]
    first_row: int = 0
    seed: int = 0
    ended: Callable[[Sequence[int], int], bool] | None = None
    keys: Sequence[tuple[int, int]] | None = None

    @property
    def row_keys(self) -> Sequence[tuple[int, int]]:
        """(seed, index) of each row: all that its random numbers depend on."""
        count = len(self.prompts)
        return self.keys or [(self.seed, self.first_row + row) for row in range(count)]

    def part(self, start: int, stop: int) -> "Job":
        """Return the rows from `start` to before `stop`, as they are among all rows."""
        rows = slice(start, stop)
        prompts, counts = self.prompts[rows], self.new_tokens[rows]
        return replace(self, prompts=prompts, new_tokens=counts, keys=self.row_keys[rows])

    @classmethod
    def joined(cls, jobs: "Sequence[Job]") -> "Job":
        """Return the rows of several jobs as one; each row has the same result as in its own."""
        return replace(
            jobs[0],
            prompts=[prompt for job in jobs for prompt in job.prompts],
            new_tokens=[count for job in jobs for count in job.new_tokens],
            keys=[key for job in jobs for key in job.row_keys],
        )

    @property
    def lengths(self) -> Tensor:
        """[R] tokens of each finished row, if nothing ends it earlier."""
        counts = [len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True)]
        return torch.tensor(counts, dtype=torch.int64)

    @cached_property
    def given(self) -> Tensor:
        """[R, W] bool: places whose token is given; W is the longest row's length."""
        given = torch.zeros(len(self.prompts), int(self.lengths.max()), dtype=torch.bool)
        for row, prompt in zip(given, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor([token is not None for token in prompt])
        return given

    @cached_property
    def tails(self) -> Tensor:
        """[R] place at which each row's open end begins; where text is given last, its length."""
        after = torch.arange(1, self.given.shape[1] + 1)
        return (self.given * after).amax(1)

    def holes(self, row: int) -> list[tuple[int, int]]:
        """Return where each run of open places of a row begins and ends."""
        length = int(self.lengths[row])
        runs = groupby(range(length), key=lambda place: bool(self.given[row, place]))
        holes = [list(places) for given, places in runs if not given]
        return [(places[0], places[-1] + 1) for places in holes]

    def leading(self, row: int) -> list[int]:
        """Return the fixed tokens before the first open place of a row."""
        return [t for t in self.prompts[row][: int(self.onwards[row, 0])] if t is not None]

    @cached_property
    def onwards(self) -> Tensor:
        """[R, W + 1] first open place of each row from every place on; past the last, its length.

        What is between is fixed, so a row that is finished up to here is so up to there.
        """
        width, lengths = self.given.shape[1], self.lengths[:, None]
        at = torch.arange(width).where(~self.given, lengths).minimum(lengths)
        return torch.cat([at, lengths], dim=1).flip(1).cummin(1).values.flip(1)


@dataclass(frozen=True)
class ContextLimit:
    """Tokens that a network sees at once.

    Attributes:
        context: tokens that it was trained on.
        block_size: tokens per block; None: a full-sequence model.
    """

    context: int
    block_size: int | None

    def stride(self, wanted: int | None) -> int:
        """Return the tokens that each further segment of a full-sequence model adds.

        Args:
            wanted: by the user; None: half the context.

        Raises:
            ConfigError: out of range, or for a model in blocks.
        """
        if wanted is None:
            return max(1, self.context // 2)
        if self.block_size is not None:
            raise ConfigError(
                f"stride {wanted}: a model in blocks finishes {self.block_size} tokens at a time; "
                "stride is for full-sequence models",
                code="stride_in_blocks",
            )
        if not 1 <= wanted <= self.context:
            allowed = f"must be in 1..{self.context}, the model's context"
            raise ConfigError(f"stride {wanted} {allowed}", code="stride_out_of_range")
        return wanted

    def window(self, wanted: int | None, longest: int) -> int | None:
        """Return the tokens before a block that the network sees; None: all.

        Args:
            wanted: by the user; 0: all. None: all of texts that fit into the context, of others as
                many as in training.
            longest: tokens of the longest text.

        Raises:
            ConfigError: not a multiple of the block size, or for a full-sequence model.
        """
        size = self.block_size
        if wanted is None:
            if size is None or longest <= self.context:
                return None
            return max(size, (self.context - size) // size * size)
        if wanted and (size is None or wanted % size):
            raise ConfigError(
                f"window {wanted}: "
                + (
                    "a full-sequence model always sees its whole context; give a stride instead"
                    if size is None
                    else f"give a multiple of the block size, {size}"
                ),
                code="window_of_full_sequence" if size is None else "window_not_in_blocks",
            )
        return wanted or None


@dataclass(frozen=True)
class Segments:
    """Division of rows into segments.

    Attributes:
        block_size: tokens per block; None: a full-sequence model.
        context: tokens that a full-sequence model sees at once.
        stride: tokens that each of its further segments adds.
    """

    block_size: int | None
    context: int
    stride: int

    def room(self, lengths: Tensor) -> int:
        """Return the tokens of the longest row, up to the end of its last block."""
        size = self.block_size or 1
        return -(-int(lengths.max()) // size) * size

    def next(self, finished: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the segments that follow.

        Args:
            finished: [R] tokens of each row that are final.
            lengths: [R] tokens of each row in the end.

        Returns:
            [R] first position of each segment's canvas, and [R] its width.
        """
        if self.block_size is not None:
            start = finished // self.block_size * self.block_size
            return start, torch.full_like(start, self.block_size)
        fits = lengths <= self.context
        start = (finished - (self.context - self.stride)).clamp(min=0).masked_fill(fits, 0)
        return start, torch.minimum(lengths - start, torch.tensor(self.context))

    def ordinals(self, starts: Tensor, passed: Tensor) -> Tensor:
        """Return the numbers of segments within their rows, [R], independent of prompts in blocks.

        Args:
            starts: [R] first positions of the segments.
            passed: [R] segments before them.
        """
        return passed if self.block_size is None else starts // self.block_size


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
        """True while a row is active or waits."""
        return bool(self.active or self.waiting)

    def admit(self) -> list[int]:
        """Give free slots to waiting rows; return these rows."""
        count = min(len(self.waiting), self.slots - len(self.active))
        new = [self.waiting.popleft() for _ in range(count)]
        self.active += new
        return new

    def advance(self, ends: Tensor, written: Readback) -> list[int]:
        """Note that the active rows have finished their segments, up to `ends`.

        Args:
            ends: [A] tokens of each row that are final now.
            written: [A, W] their tokens.

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
            tokens = written.read().tolist()
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
