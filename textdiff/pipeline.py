"""`TextDiffusion`: an export directory as Python users hold it.

td = TextDiffusion.from_pretrained("runs/quickstart/export")
print(td.generate("The iterator", num_samples=2).texts)
for step in td.stream("The iterator"):
    print(td.tokenizer.decode(step.canvas[0]))
print(td.score(["Return a new list."])[0].perplexity)
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from textdiff.data import encode_documents
from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood import Bound, Estimates, cut_windows, estimate
from textdiff.loading import (
    DTYPES,
    default_device,
    family_of,
    load_model,
    load_tokenizer,
    locate,
    read_json,
)
from textdiff.models import TextDiffusionModel
from textdiff.provenance import TRAINING_FILE, training_record
from textdiff.sampling import Controls, Job, Step, generate


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


@dataclass
class TextDiffusion:
    """A trained model with its tokenizer, family and sampling defaults.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size.
        defaults: what `generate` does unless told otherwise.
        folder: the export it was loaded from; None for one that was built in memory.
    """

    model: TextDiffusionModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    defaults: SampleDefaults = field(default_factory=SampleDefaults)
    folder: Path | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str | None = None, dtype: str = "float32"
    ) -> "TextDiffusion":
        """Loads an export directory, a run directory that has one, or a hub id.

        Args:
            path: where the export is.
            device: torch device; None: CUDA, else Apple's MPS, else the CPU.
            dtype: `float32`, `float64` or `bfloat16`.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the others.
        """
        folder = locate(path)
        where = torch.device(device or default_device())
        model = load_model(folder, DTYPES[dtype]).to(where).eval()
        tokenizer = load_tokenizer(folder, model.config)
        defaults = SampleDefaults.read(folder / "generation_config.json")
        family = family_of(model.config, where, model.exponents)
        return cls(model, tokenizer, family, defaults, folder)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights, tokenizer and sampling defaults in the export layout."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = {f.name: getattr(self.defaults, f.name) for f in fields(self.defaults)}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.folder is not None and (known := training_record(self.folder)):
            (folder / TRAINING_FILE).write_text(json.dumps(known, indent=2) + "\n")

    # --- generation ---

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        num_samples: int = 1,
        batch_size: int = 16,
        streamer: Any = None,
        on_step: Callable[[Step], None] = lambda step: None,
        seed: int = 0,
        **options: Any,
    ) -> Generation:
        """Generates text.

        Args:
            prompts: one or several beginnings; the empty one generates from nothing.
            num_samples: rows per prompt.
            batch_size: rows per network call; texts do not depend on it.
            streamer: a transformers streamer (`TextDiffusionStreamer`); takes a single row.
            on_step: called with every `Step` of every batch.
            seed: seed of the job.
            **options: fields of `SampleDefaults` to change, `steps` for `max_denoising_steps`.

        Raises:
            ConfigError: an option out of range, or a row that does not fit the context.
            DataError: a prompt with characters the tokenizer does not know.
        """
        rows = self._rows(prompts, num_samples)
        if streamer is not None and len(rows) != 1:
            raise ConfigError(f"a streamer takes one row, not {len(rows)}; generate one at a time")
        settings = self._settings(options)
        done = Generation()
        changed = 0
        for first in range(0, len(rows), max(1, batch_size)):
            job = self._job(
                rows[first : first + max(1, batch_size)], settings, first, seed, options
            )
            canvas, calls = None, 0
            for step in self._run(job, settings):
                canvas, calls, changed = step.canvas, step.calls, changed + len(step.changed)
                on_step(step)
                if streamer is not None and hasattr(streamer, "put_draft"):
                    streamer.put_draft(canvas[0, len(job.prompts[0]) :].cpu())
            done = self._finish(done, job, canvas, calls)
        if streamer is not None:
            self._feed(streamer, rows[0], done.sequences[0])
        per_call = changed / max(1, len(rows)) / max(1, done.calls)
        return replace(done, tokens_per_forward=per_call)

    def stream(
        self,
        prompts: str | Sequence[str] = "",
        *,
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> Iterator[Step]:
        """Yields a `Step` after every network call.

        Takes the options of `generate`, in one batch.
        """
        settings = self._settings(options)
        rows = self._rows(prompts, num_samples)
        yield from self._run(self._job(rows, settings, 0, seed, options), settings)

    def finished(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[str]:
        """Whole rows as text, each up to the end-of-text token that follows its prompt.

        Args:
            rows: token ids of each row.
            prompts: tokens of each row's prompt.
        """
        return [
            self.decode([*ids[:start], *self._until_end(list(ids[start:]))])
            for ids, start in zip(rows, prompts, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens removed."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # --- likelihood ---

    def estimate(self, texts: Sequence[str], **options: Any) -> Estimates:
        """Bounds the likelihood of documents; takes the options of `likelihood.estimate`.

        Raises:
            DataError: nothing to score, or characters the tokenizer does not know.
        """
        windows = cut_windows(
            encode_documents(self.tokenizer, texts),
            texts,
            self.model.config.max_position_embeddings,
            self.family.process.vocabulary.clean.cpu(),
        )
        return estimate(self.model, self.family, windows, **({"seed": 0} | options))

    def score(self, texts: Sequence[str], **options: Any) -> list[Bound]:
        """The bound of each text, by the default estimator.

        Raises:
            DataError: a text has no token, or characters the tokenizer does not know.
        """
        estimates = self.estimate(texts, **options)
        return [estimates.document(index) for index in range(len(texts))]

    # --- inside ---

    def _settings(self, options: dict[str, Any]) -> SampleDefaults:
        options = {k: v for k, v in options.items() if v is not None}
        if "steps" in options:
            options["max_denoising_steps"] = options.pop("steps")
        known = {f.name for f in fields(SampleDefaults)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
        return replace(self.defaults, **options)

    def _rows(self, prompts: str | Sequence[str], num_samples: int) -> list[list[int]]:
        if num_samples < 1:
            raise ConfigError(f"num_samples {num_samples}: give at least 1")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        clean = self.family.process.vocabulary.clean.cpu()
        rows = []
        for text, ids in zip(prompts, encode_documents(self.tokenizer, prompts), strict=True):
            if not bool(clean[torch.from_numpy(ids).long()].all()):
                raise DataError(
                    f"the prompt {text!r:.60} has characters that the tokenizer was not trained on"
                )
            rows += [ids.tolist()] * num_samples
        return rows

    def _job(
        self,
        rows: list[list[int]],
        settings: SampleDefaults,
        first: int,
        seed: int,
        options: dict[str, Any],
    ) -> Job:
        """The job of these rows.

        A default length shrinks to what the context leaves; an explicit one is kept and checked.
        """
        if settings.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens {settings.max_new_tokens}: give at least 1")
        context = self.model.config.max_position_embeddings
        explicit = options.get("max_new_tokens") is not None
        room = [settings.max_new_tokens if explicit else context - len(row) for row in rows]
        if min(room) < 1:
            longest = max(len(row) for row in rows)
            raise ConfigError(
                f"a prompt of {longest} tokens fills the model's context of {context} tokens and "
                "leaves none to generate; shorten the prompt"
            )
        return Job(rows, [min(settings.max_new_tokens, n) for n in room], first, seed)

    def _run(self, job: Job, settings: SampleDefaults) -> Iterator[Step]:
        controls = Controls(settings.temperature, settings.top_k, settings.top_p)
        return generate(
            self.model,
            self.family,
            job,
            rule=settings.rule,
            steps=settings.max_denoising_steps,
            controls=controls,
        )

    def _finish(self, done: Generation, job: Job, canvas: Any, calls: int) -> Generation:
        lengths = job.lengths.tolist()
        rows = [ids[:length] for ids, length in zip(canvas.tolist(), lengths, strict=True)]
        starts = [len(prompt) for prompt in job.prompts]
        ends = [ids[start:] for ids, start in zip(rows, starts, strict=True)]
        return Generation(
            done.texts + self.finished(rows, starts),
            done.completions + self.finished(ends, [0] * len(ends)),
            done.sequences + rows,
            done.calls + calls,
        )

    def _until_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids

    @staticmethod
    def _feed(streamer: Any, prompt: list[int], sequence: list[int]) -> None:
        """Prompt, then the whole text once: a full canvas has no finished part before that."""
        streamer.put(torch.tensor(prompt, dtype=torch.int64))
        streamer.put(torch.tensor(sequence[len(prompt) :]))
        streamer.end()
