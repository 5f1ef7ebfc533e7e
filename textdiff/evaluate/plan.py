"""What a suite is asked for, and what comes out of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError
from textdiff.evaluate.judge import Judge
from textdiff.pipeline import TextDiffusion

Tell = Callable[[str, int, int], None]
"""tell(what is being done, done, total)."""

LEAST_TEXTS = 8


@dataclass(frozen=True)
class Plan:
    """What is measured, of what.

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
                f"{count} text(s): give at least {LEAST_TEXTS}, intervals come from their spread"
            )
        if self.resamples < 100:
            raise ConfigError(f"{self.resamples} resamples: give at least 100 for an interval")
        if self.mauve and (self.judge is None or self.reference is None):
            raise ConfigError("MAUVE compares with real text in a judge's eyes: give both")

    @property
    def seed(self) -> int:
        """The seed of samples and resamples."""
        return int(self.options.get("seed") or 0)

    @property
    def length(self) -> int:
        """Tokens of a sampled row, and of a piece of real text."""
        wanted = self.options.get("max_new_tokens")
        settings = self.model.defaults.merge(max_new_tokens=wanted)
        context = int(self.model.model.config.max_position_embeddings)
        explicit = self.options.get("max_new_tokens") is not None
        return settings.max_new_tokens if explicit else min(settings.max_new_tokens, context)


@dataclass(frozen=True)
class Outcome:
    """What a suite found.

    Attributes:
        record: all of it as plain JSON data, with what it depends on.
        lines: what a terminal shows.
    """

    record: dict[str, Any]
    lines: list[str]
