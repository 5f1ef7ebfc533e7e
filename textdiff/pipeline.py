"""`TextDiffusion`: an export directory as Python users hold it.

td = TextDiffusion.from_pretrained("runs/quickstart/export")
print(td.generate("The iterator", num_samples=2).texts)
for step in td.stream("The iterator"):
    print(td.tokenizer.decode(step.canvas[0]))
print(td.score(["Return a new list."])[0].perplexity)
"""

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from textdiff.checks import checked_texts, whole_number
from textdiff.data.losses import encode_checked
from textdiff.diffusion.family import Family, block_sizes
from textdiff.errors import ConfigError, DataError
from textdiff.export.loading import (
    family_of,
    find_device,
    find_dtype,
    load_exported_tokenizer,
    load_model,
    locate_export,
    read_json,
)
from textdiff.export.records import TRAINING_FILE, training_record
from textdiff.likelihood import (
    Bound,
    Difference,
    Estimates,
    Windows,
    compare_models,
    estimate,
)
from textdiff.likelihood.protocols import find_protocol, published_windows
from textdiff.likelihood.scored_texts import Span, scored_pieces, windows_of
from textdiff.likelihood.stopping import MIN_REPLICATES
from textdiff.likelihood.windows import end_token
from textdiff.models import TextDiffusionModel
from textdiff.sampling.callbacks import (
    Callback,
    CallbackHandler,
    FinishedRow,
    StreamerCallback,
)
from textdiff.sampling.constraints import Constraint
from textdiff.sampling.controls import Hook
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import ContextLimit
from textdiff.sampling.preparation import Preparer, make_job
from textdiff.sampling.request import Request
from textdiff.sampling.results import Generation, RowReader
from textdiff.sampling.segment import Step
from textdiff.sampling.settings import SamplingConfig

COUNTS = ("replicates", "samples", "orders", "timesteps", "batch_tokens")
"""Options of `likelihood.estimate` that are whole numbers."""

SELECTION = ("prompts", "spans", "stride", "end_of_text")
"""Options of `TextDiffusion.windows` that `estimate` passes on."""

_log = logging.getLogger(__name__)


@dataclass
class TextDiffusion:
    """A trained model with its tokenizer, family and sampling defaults.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size; only tokens of the tokenizer are
            predicted.
        defaults: options that `generate` takes where none are given.
        folder: the export it was loaded from; None for one that was built in memory.
    """

    model: TextDiffusionModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    defaults: SamplingConfig = field(default_factory=SamplingConfig)
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Exclude the network's rows that are not a token of the tokenizer: they have no text."""
        named = torch.zeros_like(self.family.process.vocabulary.clean)
        ids = torch.tensor(list(self.tokenizer.get_vocab().values()), device=named.device)
        named[ids[ids < len(named)]] = True
        self.family = self.family.among(named)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
    ) -> "TextDiffusion":
        """Load an export directory, a run directory that has one, or a hub id.

        Args:
            path: where the export is.
            device: torch device; None: CUDA, else Apple's MPS, else the CPU.
            dtype: `float32`, `float64`, `bfloat16` or `float16`.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the others.
            ConfigError: there is no such device or dtype.
        """
        where, kind = find_device(device), find_dtype(dtype)
        folder = locate_export(path)
        model = load_model(folder, kind).to(where).eval()
        tokenizer = load_exported_tokenizer(folder, model.config)
        defaults = SamplingConfig.from_export(read_json(folder / "generation_config.json"))
        family = family_of(model.config, where, model.exponents)
        return cls(model, tokenizer, family, defaults, folder)

    def to(self, device: str | torch.device) -> "TextDiffusion":
        """Return the same model on another device.

        Raises:
            ConfigError: there is no such device.
        """
        where = find_device(device)
        model = self.model.to(where)
        family = family_of(model.config, where, model.exponents)
        family = family.with_block_size(self.family.block_size)
        return replace(self, model=model, family=family)

    def __getstate__(self) -> dict[str, Any]:
        # What was made along the way is made again, and holds functions that cannot be pickled.
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def block_sizes(self) -> tuple[int | None, ...]:
        """The block sizes that it was trained in, the default first; None: the whole sequence."""
        return block_sizes(self.model.config.diffusion or {"block_size": self.family.block_size})

    def with_block_size(self, block_size: int | None, trained: bool = True) -> "TextDiffusion":
        """Return the same network, generating and scoring in blocks of another size.

        Args:
            block_size: tokens per block; None: the whole sequence is one block.
            trained: whether to refuse a size that the network was not trained in: its bound would
                be one, but a loose one, and its text poor.

        Raises:
            ConfigError: a size that was not trained, or that no network could use.
        """
        if block_size is not None:
            block_size = whole_number("block size", block_size)
        if block_size is not None and not 1 <= block_size <= self._context:
            raise ConfigError(
                f"block size {block_size}: give 1 to {self._context}, the context of the model"
            )
        fixed = self.family.objective.shifted  # left to right it could not read blocks
        if block_size not in self.block_sizes and (trained or fixed):
            raise ConfigError(
                f"the model was trained {_in_blocks(self.block_sizes)}, not "
                f"{_in_blocks([block_size])}: there its text would be poor and its bound loose; "
                "choose what it was trained in"
                + ("" if fixed else ", or insist in Python: with_block_size(..., trained=False)")
            )
        return replace(self, family=self.family.with_block_size(block_size))

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights, tokenizer and sampling defaults in the export layout."""
        folder = Path(path)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        settings = self.defaults.to_export()
        (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.folder is not None and (known := training_record(self.folder)):
            (folder / TRAINING_FILE).write_text(json.dumps(known, indent=2) + "\n")

    # --- generation ---

    def generate(
        self,
        prompts: str | Sequence[str] = "",
        *,
        batch_size: int = 16,
        streamer: Any = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> Generation:
        """Generate text.

        Args:
            prompts: one or several beginnings; the empty one generates from nothing. One that has
                holes, `[MASK:n]` for n tokens, is a template: the holes are filled.
            batch_size: rows per network call; texts do not depend on it.
            streamer: a transformers streamer (`TextDiffusionStreamer`); takes a single row.
            callbacks: objects that hear of every step and row; no text depends on them.
            **options: those of `prepare`.

        Raises:
            ConfigError: an option out of range, or a prompt that would not be seen.
            DataError: a prompt with characters the tokenizer does not know.
        """
        request = self.prepare(prompts, **options)
        _log_losses(request)
        streamers = [] if streamer is None else [StreamerCallback(streamer)]
        return self.run(request, batch_size, [*callbacks, *streamers])

    def prepare(
        self,
        prompts: str | Sequence[str] = "",
        *,
        suffix: str | Sequence[str] = "",
        num_samples: int = 1,
        hooks: Sequence[Hook] = (),
        constraint: Constraint | None = None,
        seed: int = 0,
        first_row: int = 0,
        **options: Any,
    ) -> Request:
        """Return the request that `generate` runs, checked as far as no network is needed.

        Args:
            prompts: see `generate`.
            suffix: text that follows what is generated, one for all prompts or one for each.
            num_samples: rows per prompt.
            hooks: functions of (`Context`, log_x0 [N, V]) that return the log-weights [N, V] to
                draw tokens from, before temperature and truncation.
            constraint: a constraint of your own (`Constraint`), instead of `regex`, `ban`, `force`.
            seed: seed of the request.
            first_row: index of the first row under that seed, for rows of a larger job.
            **options: those of `SamplingConfig`, for which None is the model's default.

        Raises:
            ConfigError: see `generate`.
            DataError: see `generate`.
        """
        self._check_whole()
        config, explicit = self.defaults.merge(**options), options.get("max_new_tokens") is not None
        parsed = self._preparer.parse(prompts, suffix, whole_number("num_samples", num_samples))
        job = make_job(parsed, config, self.context_limit, explicit)
        seed, ended = whole_number("seed", seed), self._reader.ending(config.stop)
        job = replace(job, seed=seed, first_row=first_row, ended=ended)
        lost = [sentence for prompt in parsed for sentence in prompt.lost]
        return self._preparer.request(job, config, hooks, constraint, lost)

    def run(
        self, request: Request, batch_size: int = 16, callbacks: Sequence[Callback] = ()
    ) -> Generation:
        """Generate the rows of a request; see `generate`.

        Raises:
            ConfigError: a batch without rows.
        """
        batch_size = whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: give at least 1")
        parts = {part for callback in callbacks for part in callback.parts}
        done: list[FinishedRow] = []
        calls = row_calls = 0
        for first in range(0, len(request.job.prompts), 16 * batch_size):
            section = request.rows(first, first + 16 * batch_size)
            engine = Engine(self.model, self.family, section, batch_size, parts)
            finish = partial(self._reader.finish, section)
            done += CallbackHandler(section.job, callbacks, finish).follow(engine)
            calls += engine.predictor.calls
            row_calls += engine.predictor.rows
        return Generation.of(done, calls, row_calls, request.lost)

    def stream(
        self,
        prompts: str | Sequence[str] = "",
        *,
        parts: Collection[str] = (),
        **options: Any,
    ) -> Iterator[Step]:
        """Yield a `Step` after every network call.

        Takes the options of `prepare`, in one batch, and `parts`: those optional parts of steps
        (`draft`, `confidence`, `entropy`) that are to be filled.
        """
        request = self.prepare(prompts, **options)
        _log_losses(request)
        yield from Engine(self.model, self.family, request, parts=parts).run()

    def finished(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[str]:
        """Return whole rows as text, each up to the end-of-text token that follows its prompt.

        Args:
            rows: token ids of each row.
            prompts: tokens of each row's prompt, or of all up to its open end.
        """
        ends = zip(rows, prompts, strict=True)
        return [self.decode(self._reader.until_end(ids, start)) for ids, start in ends]

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and a space that the tokenizer added."""
        return self._reader.decode(ids)

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.tokenizer)

    @cached_property
    def _preparer(self) -> Preparer:
        return Preparer(self.model, self.family, self._reader)

    # --- likelihood ---

    def windows(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        stride: int | None = None,
        end_of_text: bool = False,
        protocol: str | None = None,
    ) -> Windows:
        """Return the windows that are scored of documents, by default whole ones.

        Args:
            texts: the documents.
            prompts: text that is given before each document and not scored.
            spans: (start, end) characters of each document that are scored, the rest being given.
            stride: tokens from one window to the next where documents are longer than the context;
                the overlap is context. None: the context, no overlap.
            end_of_text: whether -log p of every document's end is a term of its own: the token
                that ends it is scored and not counted.
            protocol: a published protocol's chunks instead (`likelihood.protocols.PROTOCOLS`).

        Raises:
            ConfigError: choices that exclude each other, or a name or number out of range.
            DataError: nothing to score, or characters the tokenizer does not know.
        """
        self._check_whole()
        stride = None if stride is None else whole_number("stride", stride)
        texts = checked_texts(texts, "texts")
        if not texts:
            raise DataError("no text given; give at least one")
        prompts = None if prompts is None else checked_texts(prompts, "prompts")
        clean = self.family.process.vocabulary.clean.cpu()
        if protocol is None:
            pieces = scored_pieces(texts, prompts, spans)
            if end_of_text and spans is not None:
                raise ConfigError("spans are scored given how their text ends: no end_of_text")
            end = end_token(self.tokenizer, clean) if end_of_text else None
            return windows_of(self.tokenizer, pieces, self._context, clean, stride, end)
        if prompts is not None or spans is not None or stride is not None or end_of_text:
            raise ConfigError(
                f"protocol {protocol} fixes its chunks: no prompts, spans, stride or end_of_text"
            )
        found = encode_checked(self.tokenizer, texts)
        chosen = find_protocol(protocol)
        return published_windows(
            chosen,
            self.tokenizer,
            found.ids,
            texts,
            self._context,
            clean,
            found.losses,
        )

    def estimate(
        self,
        texts: Sequence[str],
        *,
        protocol: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Estimates:
        """Bound the likelihood of documents.

        Args:
            texts: the documents.
            protocol: see `windows`; without an `estimator` it brings its own.
            seed: seed of the noise; two models of one seed see the same.
            **options: those of `windows`, and those of `likelihood.estimate`: `estimator`,
                `replicates`, `precision`, ...

        Raises:
            ConfigError: see `windows`, and an estimator that cannot score this model.
            DataError: see `windows`.
        """
        seed = whole_number("seed", seed)
        for name in COUNTS:
            if options.get(name) is not None:
                options[name] = whole_number(name, options[name])
        chosen = {name: options.pop(name) for name in SELECTION if name in options}
        windows = self.windows(texts, protocol=protocol, **chosen)
        if protocol is None:
            return estimate(self.model, self.family, windows, seed=seed, **options)
        published = find_protocol(protocol)
        options = published.settings(options, self.family.block_size)
        bound = estimate(self.model, self.family, windows, seed=seed, **options)
        return replace(bound, note="; ".join(filter(None, [published.note, bound.note])))

    def score(self, texts: Sequence[str], **options: Any) -> list[Bound]:
        """Return the bound of each text; takes the options of `estimate` except a protocol.

        Every text draws noise often enough for an interval of its own.

        Raises:
            DataError: a text has no token, or characters the tokenizer does not know.
        """
        texts = checked_texts(texts, "texts")
        if not texts:
            return []
        estimates = self.estimate(texts, each_document=True, **options)
        return [estimates.document(index) for index in range(len(texts))]

    def compare(self, other: "TextDiffusion", texts: Sequence[str], **options: Any) -> Difference:
        """Return this model's bound minus another's, under the same noise; below 0 it is better.

        In nats per token where both cut the texts into the same tokens and windows, else in bits
        per byte. Takes the options of `estimate`.

        Raises:
            DataError: see `estimate`.
        """
        texts = checked_texts(texts, "texts")
        run = partial(self._at_least, texts=texts, options=options)
        others_run = partial(other._at_least, texts=texts, options=options)
        return compare_models(run, others_run, options.get("replicates", MIN_REPLICATES))[0]

    # --- inside ---

    def _check_whole(self) -> None:
        """Stop where the network is not what it was when this was made.

        Raises:
            ConfigError: it has no numbers, or another vocabulary.
        """
        if self.model.device.type == "meta":
            raise ConfigError(
                "the network is on device meta, which holds shapes without numbers; load it again "
                "with TextDiffusion.from_pretrained"
            )
        rows, known = self.model.config.vocab_size, len(self.family.process.vocabulary.clean)
        if rows != known:
            raise ConfigError(
                f"the network was resized to {rows} ids, where tokenizer and process have {known}; "
                "save it with save_pretrained and load it again"
            )

    def _at_least(
        self, replicates: int, texts: Sequence[str], options: dict[str, Any]
    ) -> Estimates:
        return self.estimate(texts, **(options | {"replicates": replicates}))

    @property
    def context_limit(self) -> ContextLimit:
        """Tokens that the network sees at once."""
        return ContextLimit(self._context, self.family.block_size)

    @property
    def _context(self) -> int:
        return int(self.model.config.max_position_embeddings)


def _in_blocks(sizes: Sequence[int | None]) -> str:
    """Block sizes in words."""
    whole = ["on whole sequences"] if None in sizes else []
    blocks = [str(size) for size in sizes if size is not None]
    return " and ".join([*whole, *(["in blocks of " + " and ".join(blocks)] if blocks else [])])


def _log_losses(request: Request) -> None:
    """Log what the model does not see of the prompts."""
    for sentence in request.lost:
        _log.warning("%s", sentence)
