"""Options of the verbs that score texts, and what these verbs do with them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_origin

from pydantic import Field, create_model

from textdiff.commands.arguments import fraction, read_documents
from textdiff.commands.parallel import Processes
from textdiff.commands.sampling import flag_type
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators import (
    DEFAULT,
    DEFAULT_IN_STEPS,
    ESTIMATORS,
    build_estimator,
)
from textdiff.likelihood.estimators.estimator import Estimator
from textdiff.registry import Registry
from textdiff.section import Section
from textdiff.view.progress import ProgressBar

if TYPE_CHECKING:
    from textdiff.likelihood.estimates import Estimates
    from textdiff.pipeline import TextDiffusion


def estimator_help(estimators: Registry[Estimator]) -> str:
    """Return the help of `--estimator`: every name with its summary, a line each."""
    first = (
        f"Way to estimate the bound: {DEFAULT} by default, {DEFAULT_IN_STEPS} for models in steps. "
        "docs/bounds.md compares them."
    )
    heads = {kind: str(member.__doc__).partition("\n")[0] for kind, member in estimators.items()}
    return "\n".join([first, *(f"{kind}: {head}" for kind, head in heads.items())])


def option_flags(estimators: Registry[Estimator]) -> type:
    """Return a section with a flag for every option that estimators describe."""
    types: dict[str, Any] = {}
    helps: dict[str, list[str]] = {}
    for kind, estimator in estimators.items():
        for name, option in estimator.model_fields.items():
            if option.description:
                types.setdefault(name, flag_type(option.annotation))
                default = "" if option.default in (None, (), {}) else f" (default {option.default})"
                helps.setdefault(name, []).append(f"{kind}{default}: {option.description}")
    keys: dict[str, Any] = {
        name: (
            (kind, Field((), description="; ".join(helps[name])))
            if get_origin(kind) is tuple
            else (kind | None, Field(None, description="; ".join(helps[name])))
        )
        for name, kind in types.items()
    }
    return create_model("EstimatorOptions", __base__=Section, **keys)


EstimatorOptions: Any = option_flags(ESTIMATORS)


class ScoringOptions(EstimatorOptions):  # type: ignore[misc]
    """Options of scoring."""

    estimator: str | None = Field(None, description=estimator_help(ESTIMATORS))

    replicates: int = 8
    """Independent estimates that the error comes from: at least 8, and at least as many as draw
    noise 64 times in all (short texts); exact estimators take one."""

    precision: str | None = None
    """Draw as many replicates as it takes for the 95 % interval of the perplexity to be this narrow
    on either side, such as 0.5%; a pilot of others decides how many."""

    stride: int | None = None
    """Tokens from one window to the next where a document is longer than the model's context; the
    overlap is context and not scored twice. By default windows do not overlap and do not attend to
    each other."""

    end_of_text: bool = False
    """Score where every document ends, as a term of its own: its end-of-text token, which is not
    counted among the tokens."""

    seed: int = 0
    """Seed of the noise."""

    batch_tokens: int = 8192
    """Tokens per network call (the result does not depend on it beyond rounding)."""

    def options(self, protocol: str | None = None) -> dict[str, Any]:
        """Return the options of `TextDiffusion.estimate`.

        Args:
            protocol: name of a published protocol, which brings an estimator.

        Raises:
            ConfigError: a value out of range.
        """
        if self.replicates < 8:
            why = "the error comes from them"
            raise ConfigError(f"--replicates {self.replicates}: give at least 8, {why}")
        if self.batch_tokens < 1:
            raise ConfigError(f"--batch-tokens {self.batch_tokens}: give at least 1")
        own = {name: getattr(self, name) for name in EstimatorOptions.model_fields}
        own = {name: value for name, value in own.items() if value not in (None, ())}
        self._check_estimator(own, protocol)
        names = ["replicates", "precision", "stride", "end_of_text", "seed", "batch_tokens"]
        shared = {name: getattr(self, name) for name in [*names, "estimator"]}
        if self.precision is not None:
            shared["precision"] = fraction(self.precision)
        return {**shared, "protocol": protocol, **own}

    def _check_estimator(self, own: dict[str, Any], protocol: str | None) -> None:
        """Refuse options that no estimator in question has, before a model is loaded."""
        if self.estimator is not None:
            build_estimator(self.estimator, **own)
        elif protocol is None:
            try:
                build_estimator(DEFAULT_IN_STEPS, **own)
            except ConfigError:
                build_estimator(DEFAULT, **own)


@dataclass(frozen=True)
class ReadingOptions:
    """Texts that are read."""

    text_column: str = "text"
    """Column or key that holds the text in files of rows."""

    detokenizer: str = "none"
    """Undo a benchmark's tokenisation first: ptb, wikitext, lm1b, lambada, scientific_papers."""

    max_documents: int | None = None
    """Score the first documents only."""

    def check(self, names: Sequence[str]) -> None:
        """Refuse what cannot be read before anything is.

        Raises:
            ConfigError: no text named, or a value out of range.
        """
        if not names:
            raise ConfigError("no text given: name one or more files, or - for standard input")
        if self.max_documents is not None and self.max_documents < 1:
            raise ConfigError(f"--max-documents {self.max_documents}: give at least 1")

    def documents(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the documents to score, or the conversations, as options of `estimate`.

        Raises:
            ConfigError: no text named, or a value out of range.
            DataError: a place that holds no usable text.
        """
        from textdiff.data.conversation_rows import CONVERSATIONS
        from textdiff.data.detokenize import detokenizer
        from textdiff.data.text_files import hold_conversations

        self.check(names)
        change = detokenizer(self.detokenizer)
        talks = self.detokenizer == "none" and hold_conversations(names, self.text_column)
        rows = read_documents(names, CONVERSATIONS if talks else self.text_column)
        texts = [change(text) for text in islice(rows, self.max_documents)]
        return {"texts": texts, "conversations": True} if talks else {"texts": texts}


def shared_estimate(
    held: "TextDiffusion", title: str, processes: Processes, options: dict[str, Any]
) -> "Estimates":
    """Return a model's estimates, each process scoring its share of the windows."""
    with ProgressBar(title, processes.first) as progress:
        return held.estimate(
            **options,
            shard=(processes.rank, processes.count),
            reduce=processes.reduce,
            progress=progress,
        )


def bound_record(
    held: "TextDiffusion",
    estimates: "Estimates",
    options: dict[str, Any],
    reading: ReadingOptions,
    processes: Processes,
) -> dict[str, Any]:
    """Return a bound with everything that it depends on, as plain data."""
    from textdiff.evaluate import evaluation_record

    return evaluation_record(
        held,
        estimates,
        options,
        detokenizer=reading.detokenizer,
        processes=processes.count,
        command=["textdiff", *sys.argv[1:]],
    )


def state_path(name: str | None) -> Path | None:
    """Return the file that `--state` names, in a folder that exists.

    Raises:
        ConfigError: it cannot be written there.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"--state {name} is a folder; name a file")
    return path
