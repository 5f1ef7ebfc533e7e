"""`TextDiffusion`: an export directory as Python users hold it.

td = TextDiffusion.from_pretrained("runs/quickstart/export")
print(td.generate("The iterator", num_samples=2).texts)
for step in td.stream("The iterator"):
    print(td.tokenizer.decode(step.canvas[0]))
print(td.score(["Return a new list."])[0].perplexity)
"""

import json
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import continuation, encode_checked, opening
from textdiff.data.texts import checked_string, checked_texts, one_or_more
from textdiff.data.tokenizer import end_id, token_bytes
from textdiff.diffusion.family import Family, block_sizes
from textdiff.errors import ConfigError, DataError
from textdiff.export.loading import (
    family_of,
    find_device,
    find_dtype,
    load_model,
    load_tokenizer,
    locate_export,
)
from textdiff.export.provenance import TRAINING_FILE, training_record
from textdiff.generation import (
    Feed,
    Generation,
    Order,
    Reach,
    SampleDefaults,
    make_controls,
    make_job,
    prompt_forms,
)
from textdiff.likelihood import Bound, Difference, Estimates, Windows, compare, estimate, paired
from textdiff.likelihood.endings import end_token
from textdiff.likelihood.published import find_protocol, published_windows
from textdiff.likelihood.stopping import MIN_REPLICATES
from textdiff.likelihood.texts import Span, pieces_of, windows_of
from textdiff.models import TextDiffusionModel
from textdiff.sampling import Cache, Constraint, Hook, Job, Step, build_pattern, generate
from textdiff.sampling.constraints import Pattern
from textdiff.sampling.guidance import check_guidance
from textdiff.sampling.rules import build_rule
from textdiff.template import Form
from textdiff.watching import Audience, FinishedRow, Watcher
from textdiff.whole_numbers import whole_number

COUNTS = ("replicates", "samples", "orders", "timesteps", "batch_tokens")
"""Options of `likelihood.estimate` that are whole numbers."""

_log = logging.getLogger(__name__)


@dataclass
class TextDiffusion:
    """A trained model with its tokenizer, family and sampling defaults.

    Attributes:
        model: the network.
        tokenizer: its tokenizer.
        family: process, schedule, objective and block size; only tokens of the tokenizer are
            predicted.
        defaults: what `generate` does unless told otherwise.
        folder: the export it was loaded from; None for one that was built in memory.
    """

    model: TextDiffusionModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    defaults: SampleDefaults = field(default_factory=SampleDefaults)
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
        """Loads an export directory, a run directory that has one, or a hub id.

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
        tokenizer = load_tokenizer(folder, model.config)
        defaults = SampleDefaults.read(folder / "generation_config.json")
        family = family_of(model.config, where, model.exponents)
        return cls(model, tokenizer, family, defaults, folder)

    def to(self, device: str | torch.device) -> "TextDiffusion":
        """The same model on another device.

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
        """The same network, generating and scoring in blocks of another size.

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
        suffix: str | Sequence[str] = "",
        num_samples: int = 1,
        batch_size: int = 16,
        stop: str | Sequence[str] = (),
        cache: Cache | None = None,
        hooks: Sequence[Hook] = (),
        constraint: Constraint | None = None,
        streamer: Any = None,
        watchers: Sequence[Watcher] = (),
        seed: int = 0,
        **options: Any,
    ) -> Generation:
        """Generates text.

        Args:
            prompts: one or several beginnings; the empty one generates from nothing. One that has
                holes, `[MASK:n]` for n tokens, is a template: the holes are filled.
            suffix: text that follows what is generated, one for all prompts or one for each.
            num_samples: rows per prompt.
            batch_size: rows per network call; texts do not depend on it.
            stop: strings that end a text, which is cut before them; so does the end-of-text token.
            cache: whether to keep keys and values of finished blocks, which changes nothing but
                speed; None: for models in blocks, which alone can. "approximate": for models of
                the whole sequence, keep those of what is given or finished, which changes texts.
            hooks: functions of (`sampling.Context`, log_x0 [N, V]) that return the log-weights
                [N, V] to draw tokens from, before temperature and truncation.
            constraint: a law of the text of your own (`sampling.Constraint`), instead of `regex`
                and `ban`.
            streamer: a transformers streamer (`TextDiffusionStreamer`); takes a single row.
            watchers: who looks on; no text depends on it.
            seed: seed of the job.
            **options: fields of `SampleDefaults` to change, `steps` for `max_denoising_steps`.

        Raises:
            ConfigError: an option out of range, or a prompt that would not be seen.
            DataError: a prompt with characters the tokenizer does not know.
        """
        order = self.order(
            prompts,
            suffix=suffix,
            num_samples=num_samples,
            stop=stop,
            hooks=hooks,
            constraint=constraint,
            seed=seed,
            **options,
        )
        _report(order)
        feeds = [] if streamer is None else [Feed(streamer)]
        return self.fulfil(order, batch_size, cache, [*watchers, *feeds])

    def order(
        self,
        prompts: str | Sequence[str] = "",
        *,
        suffix: str | Sequence[str] = "",
        num_samples: int = 1,
        stop: str | Sequence[str] = (),
        hooks: Sequence[Hook] = (),
        constraint: Constraint | None = None,
        seed: int = 0,
        first_row: int = 0,
        **options: Any,
    ) -> Order:
        """What `generate` would be asked to do, checked as far as no network is needed.

        Args:
            prompts: see `generate`, as for what follows.
            suffix: see `generate`.
            num_samples: see `generate`.
            stop: see `generate`.
            hooks: see `generate`.
            constraint: see `generate`.
            seed: see `generate`.
            first_row: index of the first row under that seed, for rows of a larger job.
            **options: see `generate`.

        Raises:
            ConfigError: see `generate`.
            DataError: see `generate`.
        """
        self._check_whole()
        seed = whole_number("seed", seed)
        forms = self._forms(prompts, suffix, whole_number("num_samples", num_samples))
        settings = self.defaults.changed(options)
        explicit = options.get("max_new_tokens") is not None
        job = make_job(forms, settings, self._reach, first_row, seed, explicit)
        build_rule(settings.rule, self.family, settings.knobs)
        check_guidance(settings.guidance, self.family)
        stops = () if stop is None else tuple(one_or_more(stop, "stop"))
        bans, forced = one_or_more(settings.ban, "ban"), one_or_more(settings.force, "force")
        regex = "" if settings.regex is None else checked_string(settings.regex, "regex")
        _refuse_half_characters([*stops, *bans, *forced, regex])
        if "" in stops:
            raise ConfigError("a stop string is empty; give at least one character")
        if stops and bool((job.tails == job.lengths).all()):
            raise ConfigError(
                "stop strings end a text in the hole that nothing follows, and here given text "
                "follows every hole; leave the stop strings out"
            )
        constraint = self._pattern(settings) if constraint is None else constraint
        if constraint is not None:
            constraint.check(job)
        end = end_id(self.tokenizer, self.family.process.vocabulary.clean)
        controls = make_controls(settings, hooks, constraint, end)
        lost = tuple(dict.fromkeys(sentence for form in forms for sentence in form.lost))
        return Order(job, settings, controls, stops, lost)

    def fulfil(
        self,
        order: Order,
        batch_size: int = 16,
        cache: Cache | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> Generation:
        """Generates what was ordered; see `generate`.

        Args:
            order: rows and settings.
            batch_size: rows per network call.
            cache: whether to keep keys and values.
            watchers: who looks on.

        Raises:
            ConfigError: a batch without rows.
        """
        batch_size = whole_number("batch_size", batch_size)
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size}: give at least 1")
        slots = batch_size
        parts = {part for watcher in watchers for part in watcher.parts}
        done, written, row_calls = Generation(lost=order.lost), 0, 0
        for first in range(0, len(order.job.prompts), 16 * slots):
            part = replace(order, job=order.job.part(first, first + 16 * slots))
            audience, calls, ran = Audience(part.job, watchers, partial(self._finished, part)), 0, 0
            for step in audience.follow(self._run(part, cache, slots, parts)):
                calls, ran = step.calls, step.rows
            written += sum(row.new_tokens for row in audience.results)
            row_calls += ran
            done = done.extended(audience.results, calls)
        return replace(done, tokens_per_forward=written / max(1, row_calls))

    def stream(
        self,
        prompts: str | Sequence[str] = "",
        *,
        suffix: str | Sequence[str] = "",
        num_samples: int = 1,
        cache: Cache | None = None,
        parts: Collection[str] = (),
        seed: int = 0,
        **options: Any,
    ) -> Iterator[Step]:
        """Yields a `Step` after every network call.

        Takes the options of `generate`, in one batch, and `parts`: those optional parts of steps
        (`draft`, `confidence`, `entropy`) that are to be filled.
        """
        order = self.order(prompts, suffix=suffix, num_samples=num_samples, seed=seed, **options)
        _report(order)
        yield from self._run(order, cache, len(order.job.prompts), parts)

    def finished(self, rows: Sequence[Sequence[int]], prompts: Sequence[int]) -> list[str]:
        """Whole rows as text, each up to the end-of-text token that follows its prompt.

        Args:
            rows: token ids of each row.
            prompts: tokens of each row's prompt, or of all up to its open end.
        """
        return [
            self.decode([*ids[:start], *self._until_end(list(ids[start:]))])
            for ids, start in zip(rows, prompts, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens removed, and a space that the tokenizer put before."""
        return str(self._opening.decode(list(ids), skip_special_tokens=True))

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
        """What is scored of documents: whole ones unless told otherwise.

        Args:
            texts: the documents.
            prompts: text that is given before each document and not scored.
            spans: (start, end) characters of each document that are scored, the rest being given.
            stride: tokens from one window to the next where documents are longer than the context;
                the overlap is context. None: the context, no overlap.
            end_of_text: whether -log p of every document's end is a term of its own: the token
                that ends it is scored and not counted.
            protocol: a published protocol's chunks instead (`likelihood.published.PROTOCOLS`).

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
            pieces = pieces_of(texts, prompts, spans)
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
            chosen, self.tokenizer, found.ids, texts, self._context, clean, found.losses
        )

    def estimate(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str] | None = None,
        spans: Sequence[Sequence[Span]] | None = None,
        stride: int | None = None,
        end_of_text: bool = False,
        protocol: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Estimates:
        """Bounds the likelihood of documents.

        Args:
            texts: the documents.
            prompts: see `windows`, as for `spans`, `stride`, `end_of_text` and `protocol`.
            spans: see `windows`.
            stride: see `windows`.
            end_of_text: see `windows`.
            protocol: without an `estimator` it brings its own.
            seed: seed of the noise; two models of one seed see the same.
            **options: those of `likelihood.estimate`: `estimator`, `replicates`, `precision`, ...

        Raises:
            ConfigError: see `windows`, and an estimator that cannot score this model.
            DataError: see `windows`.
        """
        seed = whole_number("seed", seed)
        for name in COUNTS:
            if options.get(name) is not None:
                options[name] = whole_number(name, options[name])
        windows = self.windows(
            texts,
            prompts=prompts,
            spans=spans,
            stride=stride,
            end_of_text=end_of_text,
            protocol=protocol,
        )
        if protocol is None:
            return estimate(self.model, self.family, windows, seed=seed, **options)
        chosen = find_protocol(protocol)
        options = chosen.settings(options, self.family.block_size)
        found = estimate(self.model, self.family, windows, seed=seed, **options)
        return replace(found, note="; ".join(filter(None, [chosen.note, found.note])))

    def score(self, texts: Sequence[str], **options: Any) -> list[Bound]:
        """The bound of each text; takes the options of `estimate` except a protocol.

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
        """This model's bound minus another's, under the same noise; below zero this one is better.

        In nats per token where both cut the texts into the same tokens and windows, else in bits
        per byte. Takes the options of `estimate`.

        Raises:
            DataError: see `estimate`.
        """
        texts = checked_texts(texts, "texts")
        run = partial(self._at_least, texts=texts, options=options)
        others_run = partial(other._at_least, texts=texts, options=options)
        mine, others = paired(run, others_run, options.get("replicates", MIN_REPLICATES))
        return compare(mine, others, per_byte=mine.windows.digest != others.windows.digest)

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
    def _context(self) -> int:
        """Tokens that the network sees at once."""
        return int(self.model.config.max_position_embeddings)

    def _forms(
        self, prompts: str | Sequence[str], suffix: str | Sequence[str], num_samples: int
    ) -> list[Form]:
        clean = self.family.process.vocabulary.clean.cpu()
        return prompt_forms(self.tokenizer, prompts, suffix, num_samples, clean)

    @property
    def _reach(self) -> Reach:
        """What the network sees at once."""
        return Reach(self._context, self.family.block_size is not None)

    def _ended(self, stops: Sequence[str]) -> Callable[[Sequence[int], int], bool]:
        """Whether new tokens, so many of them fresh, end a text."""
        # A token is a byte at least: earlier ones cannot belong to a stop string that is new.
        reach = max((len(stop.encode()) for stop in stops), default=0)

        def ended(new: Sequence[int], fresh: int) -> bool:
            if self.tokenizer.eos_token_id in new[len(new) - fresh :]:
                return True
            late = self.decode(new[max(0, len(new) - fresh - reach) :]) if stops else ""
            return any(stop in late for stop in stops)

        return ended

    def _run(
        self, order: Order, cache: Cache | None, slots: int, parts: Collection[str]
    ) -> Generator[Step, None, Tensor]:
        settings = order.settings
        job = replace(order.job, ended=self._ended(order.stops))
        return generate(
            self.model,
            self.family,
            job,
            rule=settings.rule,
            knobs=settings.knobs,
            steps=settings.max_denoising_steps,
            controls=order.controls,
            slots=slots,
            cache=self.family.block_size is not None if cache is None else cache,
            window=self._window(job, settings.window),
            stride=settings.stride,
            guidance=settings.guidance,
            parts=parts,
        )

    def _pattern(self, settings: SampleDefaults) -> Constraint | None:
        """The constraint that the settings name, if they do."""
        if settings.regex is None and not settings.ban and not settings.force:
            return None
        banned, forced = (
            tuple(one_or_more(texts, name))
            for name, texts in (("ban", settings.ban), ("force", settings.force))
        )
        return self._patterns(settings.regex, banned, forced, settings.min_new_tokens)

    @cached_property
    def _patterns(self) -> Callable[[str | None, tuple[str, ...], tuple[str, ...], int], Pattern]:
        """The pattern of a regex, bans and forced strings; the last ones are kept.

        Making one takes seconds at 50,000 tokens, and the lines of a file mostly share theirs.
        """
        clean = self.family.process.vocabulary.clean.cpu()
        tokens = token_bytes(self.tokenizer)
        tokens += [None] * (len(clean) - len(tokens))
        spelled = [t if ok else None for t, ok in zip(tokens, clean.tolist(), strict=True)]
        end = end_id(self.tokenizer, clean)

        @lru_cache(maxsize=16)
        def pattern(
            regex: str | None, ban: tuple[str, ...], force: tuple[str, ...], least: int
        ) -> Pattern:
            return build_pattern(regex, ban, spelled, end, least, self.model.device, force)

        return pattern

    def _window(self, job: Job, window: int | None) -> int | None:
        """Tokens that a block sees before it; by default no more than in training."""
        size = self.family.block_size
        if window is not None or size is None or int(job.lengths.max()) <= self._context:
            return window or None
        return max(size, (self._context - size) // size * size)

    def _finished(self, order: Order, row: int, ids: list[int]) -> FinishedRow:
        """A row whose tokens are known."""
        seed, index = order.job.row_keys[row]
        tail, spans = int(order.job.tails[row]), order.job.holes(row)
        (whole,) = self.finished([ids], [tail])
        new = self._part(ids, tail, tail + len(self._until_end(ids[tail:])))
        cut = min((new.find(stop) for stop in order.stops if stop in new), default=len(new))
        text = whole[: len(whole) - (len(new) - cut)]
        holes = [self._part(ids, start, end) for start, end in spans]
        if spans[-1][0] == tail:  # the open end, which ends where the text does
            holes[-1] = new[:cut]
        between = [self._part(ids, a, b) for (_, a), (b, _) in pairwise(spans)]
        completion = "".join(chain.from_iterable(zip(holes, [*between, ""], strict=True)))
        written = sum(min(end, len(ids)) - start for start, end in spans)
        return FinishedRow(seed, index, text, completion, holes, ids, written)

    def _part(self, ids: list[int], start: int, stop: int) -> str:
        """Some tokens of a row as they stand in its text, whose beginning may be decoded apart."""
        tokenizer = self._onward if start else self._opening
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=True))

    @cached_property
    def _opening(self) -> PreTrainedTokenizerFast:
        """The tokenizer that decodes whole texts."""
        return opening(self.tokenizer)

    @cached_property
    def _onward(self) -> PreTrainedTokenizerFast:
        """The tokenizer for text that goes on."""
        return continuation(self.tokenizer)

    def _until_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids


def _in_blocks(sizes: Sequence[int | None]) -> str:
    """Block sizes in words."""
    whole = ["on whole sequences"] if None in sizes else []
    blocks = [str(size) for size in sizes if size is not None]
    return " and ".join([*whole, *(["in blocks of " + " and ".join(blocks)] if blocks else [])])


def _report(order: Order) -> None:
    """Log what the model does not see of the prompts."""
    for sentence in order.lost:
        _log.warning("%s", sentence)


def _refuse_half_characters(texts: Sequence[str]) -> None:
    """Stops at what no UTF-8 text can hold."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{text!r:.60} is not UTF-8 text: no text can hold it") from None
