"""Callbacks of a generation (streamers, live views, films, traces) and the rows that they receive.

A callback names the optional parts of the steps that it needs, and hears of every job, every step
and every row that is done:

    class Counter(Callback):
        def step(self, step):
            print(step.calls, len(step.changed))

    model.generate("The iterator", callbacks=[Counter()])

No token depends on callbacks.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import continuation, opening
from textdiff.errors import ConfigError
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.step import Step


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


def follow(
    engine: Engine, callbacks: Sequence[Callback], finish: Callable[[int, list[int]], FinishedRow]
) -> list[FinishedRow]:
    """Run an engine for callbacks, which hear of rows as soon as these are done.

    Args:
        engine: its job is the rows.
        callbacks: the callbacks.
        finish: makes the result of a row, its place in the job, from its token ids.

    Returns:
        The rows in the job's order.
    """
    done: dict[int, FinishedRow] = {}

    def finish_rows(rows: Iterable[int], canvas: Tensor, lengths: Tensor) -> None:
        for row in [row for row in rows if row not in done]:
            done[row] = finish(row, canvas[row, : int(lengths[row])].tolist())
            for callback in callbacks:
                callback.finished(row, done[row])

    for callback in callbacks:
        callback.begin(engine.job)
    for step in engine.run():
        assert step.done is not None
        assert step.final is not None
        finish_rows(step.done.nonzero().flatten().tolist(), step.canvas, step.final)
        for callback in callbacks:
            callback.step(step)
    rows = range(len(engine.job.prompts))
    finish_rows(rows, step.canvas, engine.final)
    return [done[row] for row in rows]


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
                code="several_rows",
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


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    Attributes:
        texts: each row whole, special tokens removed.
        completions: what follows the prompt, up to the end-of-text token; of a row with fixed text
            between or after holes, all from its first hole to its last.
        holes: what was written into each hole of each row; a plain prompt has one, its completion.
        sequences: token ids of each row, fixed ones included.
        calls: network calls (of all active rows each).
        tokens_per_forward: tokens written per row and network call.
        lost: what the model did not see of the prompts as it is written, in sentences.
        row_calls: rows of the network calls together: the sum of the calls that each row was in.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    holes: list[list[str]] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    calls: int = 0
    tokens_per_forward: float = 0.0
    lost: tuple[str, ...] = ()
    row_calls: int = 0

    @classmethod
    def of(
        cls, rows: Iterable[FinishedRow], calls: int, row_calls: int, lost: tuple[str, ...]
    ) -> "Generation":
        """Return the rows of a generation and what they took."""
        rows = list(rows)
        return cls(
            texts=[row.text for row in rows],
            completions=[row.completion for row in rows],
            holes=[row.holes for row in rows],
            sequences=[row.tokens for row in rows],
            calls=calls,
            tokens_per_forward=sum(row.new_tokens for row in rows) / max(1, row_calls),
            lost=lost,
            row_calls=row_calls,
        )


@dataclass
class RowReader:
    """Decoder of token rows.

    Attributes:
        tokenizer: the model's.
    """

    tokenizer: PreTrainedTokenizerFast

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and a space that the tokenizer added."""
        return str(self._opening.decode(list(ids), skip_special_tokens=True))

    def until_end(self, ids: Sequence[int], start: int = 0, ends: Sequence[int] = ()) -> list[int]:
        """Return a row up to the first token from `start` on that ends it; end-of-text always does.

        Args:
            ids: the row.
            start: where its open end begins.
            ends: other tokens that end it.
        """
        last = {self.tokenizer.eos_token_id, *ends}
        after = enumerate(ids[start:], start)
        return list(ids[: next((at for at, token in after if token in last), len(ids))])

    def piece(self, ids: list[int], start: int, stop: int) -> str:
        """Return some tokens of a row as its text has them; its beginning may be special."""
        tokenizer = self._onward if start else self._opening
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=True))

    def finish(self, request: Request, row: int, ids: list[int]) -> FinishedRow:
        """Return the result of a row whose tokens are known."""
        seed, index = request.job.row_keys[row]
        tail, spans = int(request.job.tails[row]), request.job.holes(row)
        whole = self.until_end(ids, tail, request.end_tokens)
        new = self.piece(ids, tail, len(whole))
        cut = min((new.find(stop) for stop in request.config.stop if stop in new), default=len(new))
        holes = [self.piece(ids, start, end) for start, end in spans]
        if spans[-1][0] == tail:  # the open end, which ends where the text does
            holes[-1] = new[:cut]
        between = [self.piece(ids, a, b) for (_, a), (b, _) in pairwise(spans)]
        text = self.decode(whole)
        return FinishedRow(
            seed=seed,
            index=index,
            text=text[: len(text) - (len(new) - cut)],
            completion="".join(chain.from_iterable(zip(holes, [*between, ""], strict=True))),
            holes=holes,
            tokens=ids,
            new_tokens=sum(min(end, len(ids)) - start for start, end in spans),
        )

    def ending(
        self, stops: Sequence[str], ends: Sequence[int] = ()
    ) -> Callable[[Sequence[int], int], bool]:
        """Return a test of new tokens, so many of them fresh: whether they end a text."""
        final = {self.tokenizer.eos_token_id, *ends}
        # A token is a byte at least: earlier ones cannot belong to a stop string that is new.
        reach = max((len(stop.encode()) for stop in stops), default=0)

        def ended(new: Sequence[int], fresh: int) -> bool:
            if not final.isdisjoint(new[len(new) - fresh :]):
                return True
            last = self.decode(new[max(0, len(new) - fresh - reach) :]) if stops else ""
            return any(stop in last for stop in stops)

        return ended

    @cached_property
    def _opening(self) -> PreTrainedTokenizerFast:
        """The tokenizer for whole texts."""
        return opening(self.tokenizer)

    @cached_property
    def _onward(self) -> PreTrainedTokenizerFast:
        """The tokenizer for text that goes on."""
        return continuation(self.tokenizer)
