"""What a generation is asked for, and what comes out of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import encode_documents
from textdiff.errors import ConfigError, DataError
from textdiff.loading import read_json
from textdiff.sampling import Job, Step
from textdiff.watching import FinishedRow, Watcher


@dataclass(frozen=True)
class SampleDefaults:
    """What `generate` does unless told otherwise, as `generation_config.json` holds it.

    Attributes:
        rule: decoding rule.
        knobs: the rule's own settings by name; another rule does not take them over.
        max_denoising_steps: steps per block.
        max_new_tokens: tokens to generate.
        temperature: 0 takes the most likely token.
        top_k: draw among the k most likely tokens.
        top_p: draw among this much probability.
        window: tokens before a block that it sees, a multiple of the block size; None: all of texts
            no longer than the context, and beyond as many as in training; 0: all.
        stride: tokens that a full-sequence model adds at a time beyond its context; None: half the
            context.
    """

    rule: str = "ancestral"
    knobs: Mapping[str, Any] = field(default_factory=dict)
    max_denoising_steps: int = 64
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    window: int | None = None
    stride: int | None = None

    @classmethod
    def read(cls, path: Path) -> "SampleDefaults":
        """Reads an export's file; keys that are not ours are left alone."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in read_json(path).items() if key in known})

    def changed(self, options: Mapping[str, Any]) -> "SampleDefaults":
        """The same with some fields changed; None keeps a default, `steps` is for short.

        Raises:
            ConfigError: there is no such field.
        """
        given = {key: value for key, value in options.items() if value is not None}
        if "steps" in given:
            given["max_denoising_steps"] = given.pop("steps")
        known = {f.name for f in fields(self)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if given.get("rule", self.rule) != self.rule:
            given.setdefault("knobs", {})
        return replace(self, **given)


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    Attributes:
        texts: prompt and completion of each row, special tokens removed.
        completions: what follows the prompt, up to the end-of-text token.
        sequences: token ids of each row, prompt included.
        calls: network calls (of all active rows each).
        tokens_per_forward: tokens written per row and network call.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    calls: int = 0
    tokens_per_forward: float = 0.0

    def extended(self, rows: Iterable[FinishedRow], calls: int) -> "Generation":
        """The same with further rows, and the calls that they took."""
        rows = list(rows)
        return replace(
            self,
            texts=self.texts + [row.text for row in rows],
            completions=self.completions + [row.completion for row in rows],
            sequences=self.sequences + [row.tokens for row in rows],
            calls=self.calls + calls,
        )


@dataclass(frozen=True)
class Order:
    """Rows to generate, and how.

    Attributes:
        job: the rows.
        settings: rule, steps, temperature, ...
        stops: strings that end a text.
    """

    job: Job
    settings: SampleDefaults
    stops: tuple[str, ...] = ()

    @classmethod
    def joined(cls, orders: "Sequence[Order]") -> "Order":
        """The rows of several orders that have the same settings and stops, as one."""
        return replace(orders[0], job=Job.joined([order.job for order in orders]))


def prompt_rows(
    tokenizer: PreTrainedTokenizerFast,
    prompts: str | Sequence[str],
    num_samples: int,
    clean: Tensor,
) -> list[list[int]]:
    """Token ids of every row of a generation.

    Args:
        tokenizer: the model's.
        prompts: one or several beginnings.
        num_samples: rows per prompt.
        clean: [V] bool, ids that the model can predict.

    Raises:
        ConfigError: no rows asked for.
        DataError: a prompt with characters the tokenizer does not know.
    """
    if num_samples < 1:
        raise ConfigError(f"num_samples {num_samples}: give at least 1")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows: list[list[int]] = []
    for text, ids in zip(prompts, encode_documents(tokenizer, prompts), strict=True):
        if not bool(clean[torch.from_numpy(ids).long()].all()):
            raise DataError(
                f"the prompt {text!r:.60} has characters that the tokenizer was not trained on"
            )
        rows += [ids.tolist()] * num_samples
    return rows


@dataclass(frozen=True)
class Reach:
    """What a network sees at once.

    Attributes:
        context: tokens it was trained on.
        in_blocks: whether it writes in blocks, and sees all before them.
    """

    context: int
    in_blocks: bool


def make_job(
    rows: list[list[int]],
    settings: SampleDefaults,
    model: Reach,
    first: int,
    seed: int,
    explicit: bool,
) -> Job:
    """The job of some rows.

    Args:
        rows: token ids of each prompt.
        settings: `max_new_tokens` and `stride` matter here.
        model: what the network sees at once.
        first: index of the first row in the whole job.
        seed: seed of the whole job.
        explicit: whether the length was asked for; one by default shrinks to what the context
            leaves, if that is anything.

    Raises:
        ConfigError: nothing to generate, or a prompt that would not be seen.
    """
    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {settings.max_new_tokens}: give at least 1")
    longest = max(len(row) for row in rows)
    if not model.in_blocks and settings.stride is None and longest >= model.context:
        raise ConfigError(
            f"a prompt of {longest} tokens fills the model's context of {model.context} tokens and "
            "leaves none to generate; shorten the prompt, or give a stride: the text then goes on "
            "from the end of the prompt, the beginning of which is not seen"
        )
    room = [settings.max_new_tokens if explicit else model.context - len(row) for row in rows]
    new = [min(settings.max_new_tokens, n) if n > 0 else settings.max_new_tokens for n in room]
    return Job(rows, new, first, seed)


class Feed(Watcher):
    """Hands one row to a transformers streamer: prompt, drafts, and what has become final.

    Args:
        streamer: with `put` and `end`, and `put_draft` if it shows drafts.
    """

    def __init__(self, streamer: Any):
        self.streamer = streamer
        self.shows_drafts = hasattr(streamer, "put_draft")
        self.parts = ("draft",) if self.shows_drafts else ()

    def begin(self, job: Job) -> None:
        """Puts the prompt.

        Raises:
            ConfigError: several rows.
        """
        if len(job.prompts) != 1:
            raise ConfigError(
                f"a streamer takes one row, not {len(job.prompts)}; generate one at a time"
            )
        self.sent = len(job.prompts[0])
        self.streamer.put(torch.tensor(job.prompts[0], dtype=torch.int64))

    def step(self, step: Step) -> None:
        """Puts what has become final, and a draft of the segment being written."""
        assert step.final is not None
        assert step.ends is not None
        self._put_until(step.canvas[0].cpu(), int(step.final[0]))
        if self.shows_drafts:
            assert step.draft is not None
            self.streamer.put_draft(step.draft[0, self.sent : int(step.ends[0])].cpu())

    def finished(self, row: int, result: FinishedRow) -> None:
        """Puts what is left of the row."""
        self._put_until(torch.tensor(result.tokens, dtype=torch.int64), len(result.tokens))
        self.streamer.end()

    def _put_until(self, row: Tensor, final: int) -> None:
        if final > self.sent:
            self.streamer.put(row[self.sent : final])
            self.sent = final
