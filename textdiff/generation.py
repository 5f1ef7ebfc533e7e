"""What a generation is asked for, and what comes out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import encode_documents
from textdiff.errors import ConfigError, DataError
from textdiff.loading import read_json
from textdiff.sampling import Job


@dataclass(frozen=True)
class SampleDefaults:
    """What `generate` does unless told otherwise, as `generation_config.json` holds it."""

    rule: str = "ancestral"
    max_denoising_steps: int = 64
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

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
        return replace(self, **given)


@dataclass(frozen=True)
class Generation:
    """Finished rows.

    Attributes:
        texts: prompt and completion of each row, special tokens removed.
        completions: what follows the prompt, up to the end-of-text token.
        sequences: token ids of each row, prompt included.
        calls: network calls (of a whole batch each).
        tokens_per_forward: new tokens per row and network call.
    """

    texts: list[str] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    calls: int = 0
    tokens_per_forward: float = 0.0


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


def make_job(
    rows: list[list[int]],
    settings: SampleDefaults,
    context: int,
    first: int,
    seed: int,
    explicit: bool,
) -> Job:
    """The job of some rows.

    Args:
        rows: token ids of each prompt.
        settings: `max_new_tokens` matters here.
        context: tokens that the network sees at once.
        first: index of the first row in the whole job.
        seed: seed of the whole job.
        explicit: whether the length was asked for; one by default shrinks to what the context
            leaves, an explicit one is kept and checked.

    Raises:
        ConfigError: nothing to generate, or no room for it.
    """
    if settings.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {settings.max_new_tokens}: give at least 1")
    room = [settings.max_new_tokens if explicit else context - len(row) for row in rows]
    if min(room) < 1:
        longest = max(len(row) for row in rows)
        raise ConfigError(
            f"a prompt of {longest} tokens fills the model's context of {context} tokens and "
            "leaves none to generate; shorten the prompt"
        )
    return Job(rows, [min(settings.max_new_tokens, n) for n in room], first, seed)


def feed(streamer: Any, prompt: Sequence[int], sequence: Sequence[int]) -> None:
    """Prompt, then the whole text once: a full canvas has no finished part before that."""
    streamer.put(torch.tensor(prompt, dtype=torch.int64))
    streamer.put(torch.tensor(sequence[len(prompt) :]))
    streamer.end()
