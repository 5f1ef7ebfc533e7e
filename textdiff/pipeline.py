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
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from textdiff.data import encode_documents
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.likelihood import Bound, Estimates, cut_windows, masked_count
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.sampling import Controls, Job, Step, generate

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


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
        return cls(**{key: value for key, value in _read_json(path).items() if key in known})


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
    """A trained model with its tokenizer, family and sampling defaults."""

    model: TextDiffusionModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    defaults: SampleDefaults = field(default_factory=SampleDefaults)

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
        folder = _locate(path)
        where = torch.device(device or default_device())
        model = _load_model(folder, DTYPES[dtype]).to(where).eval()
        tokenizer = _load_tokenizer(folder, model.config)
        defaults = SampleDefaults.read(folder / "generation_config.json")
        return cls(model, tokenizer, family_of(model.config, where), defaults)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes weights, tokenizer and sampling defaults in the export layout."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = {f.name: getattr(self.defaults, f.name) for f in fields(self.defaults)}
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")

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
        """Bounds the likelihood of documents; takes the options of `likelihood.masked_count`.

        Raises:
            DataError: nothing to score, or characters the tokenizer does not know.
        """
        windows = cut_windows(
            encode_documents(self.tokenizer, texts),
            texts,
            self.model.config.max_position_embeddings,
            self.family.process.vocabulary.clean.cpu(),
        )
        return masked_count(self.model, self.family, windows, **({"seed": 0} | options))

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


def family_of(config: TextDiffusionConfig, device: torch.device) -> Family:
    """The diffusion family that a model's configuration names.

    Raises:
        CheckpointError: the configuration does not say.
    """
    if config.diffusion is None or config.mask_token_id is None:
        raise CheckpointError(
            "config.json has no `diffusion` section or no mask_token_id: it is not a "
            "textdiff export"
        )
    vocabulary = Vocabulary.of(
        config.vocab_size, config.mask_token_id, config.excluded_token_ids or ()
    )
    try:
        return build_family(config.diffusion, vocabulary, device)
    except ValueError as error:
        raise CheckpointError(f"config.json names no valid diffusion family: {error}") from None


def default_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _locate(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if (folder / "export" / "config.json").is_file():
        return folder / "export"
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{path} is a file; give the export directory that holds config.json")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "runs/")):
        raise CheckpointError(
            f"{path}: no such directory; give a run's export directory (runs/NAME/export)"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such directory, and the hub could not be reached for a model of that name "
            f"({type(error).__name__}); check the path or the network"
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; export the model again") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the model again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged (no JSON object); export the model again")
    return content


def _load_model(folder: Path, dtype: torch.dtype) -> TextDiffusionModel:
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "textdiff":
        raise CheckpointError(f"{folder}/config.json is of a {kind!r} model, not a textdiff export")
    if not (folder / "model.safetensors").is_file() and not any(folder.glob("*.index.json")):
        raise CheckpointError(f"{folder}/model.safetensors is missing; export the model again")
    model: TextDiffusionModel
    try:
        model, info = TextDiffusionModel.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{folder} cannot be loaded, a file is damaged or does not fit ({reason[0]}); export "
            "the model again"
        ) from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(what):
            raise CheckpointError(
                f"{folder}/model.safetensors does not fit config.json ({what.replace('_', ' ')}: "
                f"{sorted(map(str, info[what]))[0]}); export the model again"
            )
    return model


def _load_tokenizer(folder: Path, config: TextDiffusionConfig) -> PreTrainedTokenizerFast:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{folder}/tokenizer.json is missing; export the model again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer in {folder} is damaged ({error}); export the model again"
        ) from None
    if tokenizer.mask_token_id is None:
        raise CheckpointError(f"the tokenizer in {folder} has no mask token; it is needed here")
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} ({len(tokenizer)} tokens, mask {tokenizer.mask_token_id}) "
            f"does not fit config.json ({config.vocab_size} rows, mask {config.mask_token_id})"
        )
    return tokenizer
