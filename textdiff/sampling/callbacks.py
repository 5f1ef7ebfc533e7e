"""Callbacks of a generation: streamers, live views, films, traces, files of rows.

A callback names the optional parts of the steps that it needs, and hears of every job, every step
and every row that is done:

    class Counter(Callback):
        def step(self, step):
            print(step.calls, len(step.changed))

    model.generate("The iterator", callbacks=[Counter()])

No token depends on callbacks.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from textdiff.errors import ConfigError
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.segment import Step


@dataclass(frozen=True)
class FinishedRow:
    """A row as it will stay.

    Attributes:
        seed: seed of its random numbers.
        index: its index under that seed.
        text: all of it, special tokens removed.
        completion: what follows the prompt, up to the end-of-text token or a stop string; of a row
            with given text between or after holes, all from its first hole to its last.
        holes: what was written into each hole; a plain prompt has one, its completion.
        tokens: all its token ids, also those that the text was cut before.
        new_tokens: how many of them were generated.
    """

    seed: int
    index: int
    text: str
    completion: str
    holes: list[str]
    tokens: list[int]
    new_tokens: int


class Callback:
    """Observer of a generation; this base does nothing.

    Attributes:
        parts: optional parts of steps that it needs, of `sampling.watch.PARTS`.
    """

    parts: Collection[str] = ()

    def begin(self, job: Job) -> None:
        """Start with new rows, up to 16 batches; steps are theirs until the next call."""

    def step(self, step: Step) -> None:
        """Take the step of a network call."""

    def finished(self, row: int, result: FinishedRow) -> None:
        """Take a row that is done; rows finish in any order.

        Args:
            row: its place in the job, as in the canvas of steps.
            result: what became of it.
        """


class CallbackHandler:
    """The callbacks of one request, which hear of rows as soon as these are done.

    Args:
        job: the rows.
        callbacks: the callbacks.
        finish: makes the result of a row, its place in the job, from its token ids.
    """

    def __init__(
        self,
        job: Job,
        callbacks: Sequence[Callback],
        finish: Callable[[int, list[int]], FinishedRow],
    ):
        self.job, self.callbacks, self.finish = job, callbacks, finish
        self.done: dict[int, FinishedRow] = {}

    def follow(self, engine: Engine) -> list[FinishedRow]:
        """Run an engine; return the rows in the job's order."""
        for callback in self.callbacks:
            callback.begin(self.job)
        for step in engine.run():
            assert step.done is not None
            assert step.final is not None
            self._finish(step.done.nonzero().flatten().tolist(), step.canvas, step.final)
            for callback in self.callbacks:
                callback.step(step)
        rows = range(len(self.job.prompts))
        self._finish(rows, step.canvas, engine.final)
        return [self.done[row] for row in rows]

    def _finish(self, rows: Iterable[int], canvas: Tensor, lengths: Tensor) -> None:
        for row in rows:
            if row in self.done:
                continue
            self.done[row] = self.finish(row, canvas[row, : int(lengths[row])].tolist())
            for callback in self.callbacks:
                callback.finished(row, self.done[row])


class StreamerCallback(Callback):
    """Feeder of a transformers streamer with one row: prompt, drafts and final tokens.

    Args:
        streamer: with `put` and `end`, and `put_draft` if it shows drafts.
    """

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self.shows_drafts = hasattr(streamer, "put_draft")
        self.parts = ("draft",) if self.shows_drafts else ()

    def begin(self, job: Job) -> None:
        """Put the prompt.

        Raises:
            ConfigError: several rows.
        """
        if len(job.prompts) != 1:
            raise ConfigError(
                f"a streamer takes one row, not {len(job.prompts)}; generate one at a time",
                code="streamer_rows",
            )
        prompt = job.leading(0)
        self.sent = len(prompt)
        self.streamer.put(torch.tensor(prompt, dtype=torch.int64))

    def step(self, step: Step) -> None:
        """Put new final tokens, and a draft of the segment being written."""
        assert step.final is not None
        assert step.ends is not None
        self._put_until(step.canvas[0].cpu(), int(step.final[0]))
        if self.shows_drafts:
            assert step.draft is not None
            self.streamer.put_draft(step.draft[0, self.sent : int(step.ends[0])].cpu())

    def finished(self, row: int, result: FinishedRow) -> None:
        """Put the rest of the row."""
        self._put_until(torch.tensor(result.tokens, dtype=torch.int64), len(result.tokens))
        self.streamer.end()

    def _put_until(self, row: Tensor, final: int) -> None:
        if final > self.sent:
            self.streamer.put(row[self.sent : final])
            self.sent = final
