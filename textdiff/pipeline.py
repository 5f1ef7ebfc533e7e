"""`TextDiffusion`: an export directory as Python users hold it.

td = TextDiffusion.from_pretrained("runs/quickstart/export")
print(td.generate("The iterator", num_samples=2).texts)
print(td.score(["Return a new list."])[0].perplexity)
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from textdiff.checks import whole_number
from textdiff.diffusion.family import block_sizes, sizes_in_words
from textdiff.errors import ConfigError
from textdiff.export.loading import family_of, find_device, find_dtype, halves_blocks
from textdiff.export.published import open_model
from textdiff.export.saving import SavedModel
from textdiff.likelihood.text_scorer import TextScorer
from textdiff.models.half_blocks import halve_blocks
from textdiff.sampling.callbacks import (
    Callback,
    FinishedRow,
    Generation,
    RowReader,
    StreamerCallback,
    follow,
)
from textdiff.sampling.chat import ChatModel
from textdiff.sampling.constraints import Constraint
from textdiff.sampling.controls import Hook
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import ContextLimit
from textdiff.sampling.request import Preparer, Prompts, Request, make_job
from textdiff.sampling.settings import SamplingConfig
from textdiff.sampling.step import Step

_log = logging.getLogger(__name__)


@dataclass
class TextDiffusion(SavedModel, TextScorer, ChatModel):
    """A trained model with its tokenizer, family and sampling defaults.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size; only tokens of the tokenizer are
            predicted.
        defaults: options that `generate` takes where none are given.
        folder: the export it was loaded from; None for one that was built in memory.
    """

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
        dtype: str | torch.dtype = "auto",
        *,
        tokenizer: str | None = None,
        family: str | None = None,
    ) -> "TextDiffusion":
        """Load an export, a run that has one, or a published checkpoint, from here or the hub.

        Args:
            path: folder of an export, a run or a published checkpoint, file of its weights, or hub
                id, also with a revision: `owner/name@branch`.
            device: torch device; None: CUDA, else Apple's MPS, else the CPU.
            dtype: `float32`, `float64`, `bfloat16`, `float16`, or `auto`: float32, and on a GPU
                bfloat16 with a head and norms in float32. float32 on a GPU has no TF32, unless
                `torch.set_float32_matmul_precision("high")` allows it.
            tokenizer: folder or hub id of a published checkpoint's tokenizer; None: its own.
            family: name of the family of a published checkpoint; None: it is recognised.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the others.
            ConfigError: an unknown device or dtype.
        """
        where, kind = find_device(device), find_dtype(dtype)
        if not halves_blocks(dtype, where):
            return cls(*open_model(path, where, kind, tokenizer, family))
        held = cls(*open_model(path, torch.device("cpu"), kind, tokenizer, family))
        halve_blocks(held.model)  # before it moves: the GPU never holds it in float32
        return held.to(where)

    def to(self, device: str | torch.device) -> "TextDiffusion":
        """Return the same model on another device.

        Raises:
            ConfigError: an unknown device.
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
            if not 1 <= block_size <= self.context:
                raise ConfigError(
                    f"block size {block_size}: give 1 to {self.context}, the context of the model"
                )
        fixed = self.family.objective.shifted  # left to right it could not read blocks
        if block_size not in self.block_sizes and (trained or fixed):
            raise ConfigError(
                f"the model was trained {sizes_in_words(self.block_sizes)}, not "
                f"{sizes_in_words([block_size])}: there its text would be poor and its bound "
                "loose; choose what it was trained in"
                + ("" if fixed else ", or insist in Python: with_block_size(..., trained=False)")
            )
        return replace(self, family=self.family.with_block_size(block_size))

    def generate(
        self,
        prompts: Prompts = "",
        *,
        batch_size: int = 16,
        streamer: Any = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> Generation:
        """Generate text.

        Args:
            prompts: one or several beginnings; the empty one generates from nothing. One that has
                holes, `[MASK:n]` for n tokens, is a template: the holes are filled. Or what
                `chat_prompts` returns.
            batch_size: rows per network call; texts do not depend on it.
            streamer: a transformers streamer (`TextDiffusionStreamer`); takes a single row.
            callbacks: objects that hear of every step and row; no text depends on them.
            **options: those of `prepare`.

        Raises:
            ConfigError: an option out of range, or a prompt that would not be seen.
            DataError: a prompt with characters that the tokenizer was not trained on.
        """
        request = self.prepare(prompts, **options)
        _log_losses(request)
        more = [] if streamer is None else [StreamerCallback(streamer)]
        return self.run(request, batch_size, [*callbacks, *more])

    def prepare(
        self,
        prompts: Prompts = "",
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
        self.check_whole()
        config, explicit = self.defaults.merge(**options), options.get("max_new_tokens") is not None
        parsed = self._preparer.parse(prompts, suffix, whole_number("num_samples", num_samples))
        job = make_job(parsed, config, self.context_limit, explicit)
        ends = sorted({token for prompt in parsed for token in prompt.ends})
        seed, ended = whole_number("seed", seed), self._reader.ending(config.stop, ends)
        job = replace(job, seed=seed, first_row=first_row, ended=ended)
        lost = [sentence for prompt in parsed for sentence in prompt.lost]
        return self._preparer.request(job, config, hooks, constraint, lost, ends)

    def run(
        self, request: Request, batch_size: int = 16, callbacks: Sequence[Callback] = ()
    ) -> Generation:
        """Generate the rows of a request; see `generate`.

        Raises:
            ConfigError: a batch without rows.
        """
        batch_size = whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: give at least 1", code="no_rows")
        parts = {name for callback in callbacks for name in callback.parts}
        done: list[FinishedRow] = []
        calls = row_calls = 0
        for first in range(0, len(request.job.prompts), 16 * batch_size):
            section = request.rows(first, first + 16 * batch_size)
            engine = Engine(self.model, self.family, section, batch_size, parts)
            done += follow(engine, callbacks, partial(self._reader.finish, section))
            calls += engine.predictor.calls
            row_calls += engine.predictor.rows
        return Generation.of(done, calls, row_calls, request.lost)

    def stream(
        self,
        prompts: Prompts = "",
        *,
        parts: Collection[str] = (),
        **options: Any,
    ) -> Iterator[Step]:
        """Yield a `Step` after every network call; takes the options of `prepare`, in one batch.

        `parts` are optional parts of steps (`draft`, `confidence`, `entropy`) to be filled.
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
        return [self.decode(self._reader.until_end(*pair)) for pair in ends]

    def decode(self, ids: Sequence[int]) -> str:
        """Return token ids as text, without special tokens and a space that the tokenizer added."""
        return self._reader.decode(ids)

    @cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.tokenizer)

    @cached_property
    def _preparer(self) -> Preparer:
        return Preparer(self.model, self.family, self.tokenizer)

    @property
    def context_limit(self) -> ContextLimit:
        """Tokens that the network reads at once."""
        return ContextLimit(self.context, self.family.block_size)


def _log_losses(request: Request) -> None:
    for sentence in request.lost:
        _log.warning("%s", sentence)
