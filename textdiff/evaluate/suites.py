"""Suites of measurements by the names that `--suite` uses, their options and results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError, closest
from textdiff.evaluate.judges import Judge
from textdiff.evaluate.text_set import TextSet, of_sequences
from textdiff.pipeline import TextDiffusion

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
        grid: settings of a sweep by `grid.read_grid`; None: the default.
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
        context = int(self.model.model.config.max_position_embeddings)
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
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class SuiteResult:
    """Result of a suite.

    Attributes:
        record: all of it as plain JSON data, with everything it depends on.
        lines: what a terminal shows.
    """

    record: dict[str, Any]
    lines: list[str]


@dataclass(frozen=True)
class Suite:
    """A suite: a function of its own name in a module of its own.

    Attributes:
        summary: what it measures.
        module: where the function is.
        name: the function, called with options and a report of progress.
        sweeps: whether it goes over a grid of settings, which can be drawn.
    """

    summary: str
    module: str
    name: str
    sweeps: bool = False

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
}


def find_suite(name: str) -> Suite:
    """Return the suite of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; {closest(name, SUITES)}", code="unknown_suite")
    return SUITES[name]
