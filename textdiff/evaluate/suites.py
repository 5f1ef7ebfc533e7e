"""Suites of measurements by the names that `--suite` uses, the texts they measure, and results."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from textdiff.data.losses import encode_checked
from textdiff.errors import ConfigError, DataError, closest
from textdiff.evaluate.judges import Judge
from textdiff.models.half_blocks import dtype_name
from textdiff.pipeline import TextDiffusion

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSet:
    """T texts in the tokens of one model.

    Attributes:
        texts: as a reader gets them.
        tokens: ids of each text, its end-of-text token left out.
        ended: whether each text came to its end-of-text token; None: unknown.
    """

    texts: list[str]
    tokens: list[list[int]]
    ended: list[bool] | None = None

    def __post_init__(self) -> None:
        if not any(self.tokens):
            raise DataError("nothing to measure: all of them are empty", code="all_texts_empty")

    def __len__(self) -> int:
        return len(self.texts)


def of_sequences(model: TextDiffusion, sequences: Sequence[Sequence[int]]) -> TextSet:
    """Return rows of tokens as texts, each up to its first end-of-text token.

    Args:
        model: decodes them.
        sequences: token ids of each row.
    """
    end = model.tokenizer.eos_token_id
    ended = [end in ids for ids in sequences]
    rows = [
        list(ids[: list(ids).index(end)] if done else ids)
        for ids, done in zip(sequences, ended, strict=True)
    ]
    return TextSet([model.decode(ids) for ids in rows], rows, ended)


def text_set_of(model: TextDiffusion, texts: Sequence[str]) -> TextSet:
    """Encode texts from elsewhere in the model's tokens.

    Raises:
        DataError: no text, or characters that are unknown to the tokenizer.
    """
    return TextSet(list(texts), [ids.tolist() for ids in _encoded(model, texts)])


def real_pieces(
    model: TextDiffusion, documents: Sequence[str], length: int, count: int, least: int = 0
) -> tuple[TextSet, TextSet | None]:
    """Return real texts cut as sampled rows are.

    As in training the documents are joined, an end-of-text token after each, and cut into rows of
    `length` tokens. Like a sampled row each is then read up to its first end-of-text token.

    Args:
        model: its tokenizer encodes, decodes and ends documents.
        documents: real texts.
        length: tokens per row.
        count: rows wanted, taken evenly over all.
        least: tokens that a row must have before its end, as samples must: others are passed over.

    Returns:
        `count` pieces, and as many others if there are enough rows, to compare the first with.

    Raises:
        DataError: fewer than `count` rows, or characters that are unknown to the tokenizer.
    """
    end = model.tokenizer.eos_token_id
    after = np.array([] if end is None else [end], dtype=np.int64)
    pieces = [piece for ids in _encoded(model, documents) for piece in (ids, after)]
    stream = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
    cut = stream[: len(stream) // length * length].reshape(-1, length)
    cut = cut[~(cut[:, :least] == end).any(1)] if end is not None else cut
    rows = len(cut)
    if rows < count:
        raise DataError(
            f"the reference has {len(stream):,} tokens, {rows} pieces of {length}"
            + (f" with no end among their first {least}" if least else "")
            + f", and {count} are needed to stand beside the samples; give more text, or fewer or "
            "shorter samples",
            code="too_little_reference",
        )
    sets = 2 if rows >= 2 * count else 1
    places = np.linspace(0, rows, sets * count, endpoint=False).astype(np.int64)
    first, *others = (of_sequences(model, cut[places[s::sets]].tolist()) for s in range(sets))
    return first, others[0] if others else None


def _encoded(model: TextDiffusion, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids of texts.

    Raises:
        DataError: characters that are unknown to the tokenizer.
    """
    clean = model.family.process.vocabulary.clean.cpu().numpy()
    encoded = encode_checked(model.tokenizer, texts)
    for number, (text, ids) in enumerate(zip(texts, encoded.ids, strict=True), start=1):
        if not clean[ids].all():
            raise DataError(
                f"text {number} ({text!r:.40}) has characters that the model's tokenizer was not "
                "trained on; measure with a model that was"
            )
    if encoded.losses:
        number, loss = next(iter(encoded.losses.items()))
        _log.warning(
            "the model's tokens do not give %d of %d texts back (in text %d %s): figures of tokens "
            "are of what they give back",
            len(encoded.losses),
            len(texts),
            number + 1,
            loss,
        )
    return encoded.ids


Report = Callable[[str, int, int], None]
"""report(name of a stage, done, total)."""

LEAST_TEXTS = 8


@dataclass(frozen=True)
class SuiteOptions:
    """Options of a suite: the texts to measure, and everything they are measured with.

    Attributes:
        model: samples texts, and counts them in its tokens.
        name: the model as the user named it.
        options: of `TextDiffusion.generate`: rule, steps, temperature, seed, ...
        num_samples: texts to sample.
        batch_size: texts per network call.
        given: texts from elsewhere instead of sampled ones; None: sample.
        reference: real documents; None: no reference.
        judge: gives texts a likelihood; None: those figures are left out.
        mauve: whether to compute MAUVE, which needs a reference and a judge.
        resamples: sets of texts that intervals come from.
        grid: settings of a sweep by `frontier.read_grid`; None: the default.
        output: file of the result, which a sweep goes on from.
        command: the command line, for the record.
    """

    model: TextDiffusion
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    num_samples: int = 64
    batch_size: int = 16
    given: Sequence[str] | None = None
    reference: Sequence[str] | None = None
    judge: Judge | None = None
    mauve: bool = False
    resamples: int = 1000
    grid: Mapping[str, Any] | None = None
    output: Path | None = None
    command: Sequence[str] = ()

    def __post_init__(self) -> None:
        count = self.num_samples if self.given is None else len(self.given)
        if count < LEAST_TEXTS:
            raise ConfigError(
                f"{count} text(s): give at least {LEAST_TEXTS}, intervals come from their spread",
                code="too_few_texts",
            )
        if self.resamples < 100:
            raise ConfigError(f"{self.resamples} resamples: give at least 100 for an interval")
        if self.mauve and (self.judge is None or self.reference is None):
            raise ConfigError("MAUVE compares features of real text under a judge: give both")

    @property
    def seed(self) -> int:
        """Seed of samples and resamples."""
        return int(self.options.get("seed") or 0)

    @property
    def length(self) -> int:
        """Tokens of a sampled row, and of a piece of real text."""
        settings = self.model.defaults.merge(max_new_tokens=self.options.get("max_new_tokens"))
        context = self.model.model.context
        explicit = self.options.get("max_new_tokens") is not None
        return settings.max_new_tokens if explicit else min(settings.max_new_tokens, context)

    def sample(self, options: Mapping[str, Any]) -> tuple[TextSet, float]:
        """Sample texts unconditionally.

        Args:
            options: of `TextDiffusion.generate`, before those of the suite.

        Returns:
            The texts up to their ends, and tokens written per network call of a row, those behind
            an end included.

        Raises:
            ConfigError: options that the model refuses.
        """
        done = self.model.generate(
            "",
            num_samples=self.num_samples,
            batch_size=self.batch_size,
            **{**self.options, "max_new_tokens": self.length, **options},
        )
        return of_sequences(self.model, done.sequences), done.tokens_per_forward

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that texts sampled with these options depend on, with defaults."""
        changed = {**self.options, "max_new_tokens": self.length, **options}
        changed.pop("seed", None)  # not an option of a model
        settings = self.model.defaults.merge(**changed).to_export()
        settings["steps"] = settings.pop("max_denoising_steps")
        if settings.get("cache") != "approximate":  # others change no text
            settings.pop("cache", None)
        return settings | {
            "seed": self.seed,
            "num_samples": self.num_samples,
            "block_size": self.model.family.block_size,
            "dtype": dtype_name(self.model.model),
        }


@dataclass(frozen=True)
class SuiteResult:
    """Result of a suite as plain JSON data, and the lines that a terminal shows."""

    record: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True)
class Suite:
    """A suite: a function of its own name in a module of its own.

    Attributes:
        summary: what it measures.
        module: where the function is.
        name: the function, called with options and a report of progress.
        sweeps: whether it goes over a grid of settings, which `draw_NAME` of its module draws.
    """

    summary: str
    module: str
    name: str
    sweeps: bool = False

    def draw(self, record: Mapping[str, Any], path: Path) -> None:
        """Draw the result of a sweep into a PNG file."""
        getattr(import_module(self.module), f"draw_{self.name}")(record, path)

    def run(self, options: SuiteOptions, report: Report) -> SuiteResult:
        """Measure what options ask for."""
        result: SuiteResult = getattr(import_module(self.module), self.name)(options, report)
        return result


SUITES: dict[str, Suite] = {
    "generation": Suite(
        "texts of one setting, beside real text", "textdiff.evaluate.single_setting", "generation"
    ),
    "frontier": Suite(
        "perplexity, entropy, tokens per call over a grid",
        "textdiff.evaluate.frontier",
        "frontier",
        sweeps=True,
    ),
    "likelihood-frontier": Suite(
        "exact likelihood of held-out text against tokens per call, without a judge",
        "textdiff.evaluate.likelihood_frontier",
        "likelihood_frontier",
        sweeps=True,
    ),
}


def find_suite(name: str) -> Suite:
    """Return the suite of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; {closest(name, SUITES)}", code="unknown_suite")
    return SUITES[name]
