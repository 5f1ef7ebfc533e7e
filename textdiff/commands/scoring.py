"""What verbs that score texts have in common: their flags, and what these ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from textdiff.commands.arguments import BlockSize, Dtype, fraction
from textdiff.commands.inputs import read_documents
from textdiff.errors import ConfigError


@dataclass(frozen=True)
class Scoring:
    """How texts are scored."""

    estimator: str | None = None
    """masked_count (the default), finite_t (the default for models in steps), balanced, time,
    any_order, importance, chain_rule or exact; docs/bounds.md compares them."""

    replicates: int = 8
    """Independent estimates that the error comes from: at least 8, and at least as many as draw
    noise 64 times in all (short texts); exact estimators take one."""

    precision: str | None = None
    """Draw as many replicates as it takes for the 95 % interval of the perplexity to be this narrow
    on either side, such as 0.5%; a pilot of others says how many."""

    samples: int | None = None
    """Noise draws per window and replicate."""

    orders: int | None = None
    """Orders of the importance estimator: more of them, a tighter bound."""

    timesteps: int | None = None
    """Steps of the finite_t estimator, for a model of continuous time."""

    eps: float | None = None
    """Earliest time of the time estimator."""

    stride: int | None = None
    """Tokens from one window to the next where a document is longer than the model's context; the
    overlap is context and not scored twice. By default windows do not overlap and do not see each
    other."""

    end_of_text: bool = False
    """Score where every document ends, as a term of its own: its end-of-text token, which is not
    counted among the tokens."""

    block_size: BlockSize = None
    """Tokens per block, of those that the model was trained in, or full; the default is the first
    of them."""

    seed: int = 0
    """Seed of the noise."""

    batch_tokens: int = 8192
    """Tokens per network call (the result does not depend on it beyond rounding)."""

    device: str | None = None
    """Torch device; the default is CUDA if there is one, else the CPU."""

    dtype: Dtype = "float32"
    """Dtype of the network; normalisation is float32 or wider in any case."""

    def estimator_options(self) -> dict[str, Any]:
        """The estimator and its own options, those that were given."""
        names = ("estimator", "samples", "orders", "timesteps", "eps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def options(self) -> dict[str, Any]:
        """Options of `TextDiffusion.estimate`.

        Raises:
            ConfigError: a value out of range.
        """
        for name, least in (("replicates", 8), ("batch_tokens", 1), ("samples", 1), ("orders", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = name.replace("_", "-")
                why = ", the error comes from them" if name == "replicates" else ""
                raise ConfigError(f"--{flag} {value}: give at least {least}{why}")
        return {
            "replicates": self.replicates,
            "precision": None if self.precision is None else fraction(self.precision),
            "stride": self.stride,
            "end_of_text": self.end_of_text,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            **self.estimator_options(),
        }


@dataclass(frozen=True)
class Reading:
    """What is read."""

    text_column: str = "text"
    """Column or key that holds the text in files of rows."""

    detokenizer: str = "none"
    """Undo a benchmark's tokenisation first: ptb, wikitext, lm1b, lambada, scientific_papers."""

    max_documents: int | None = None
    """Score the first documents only."""

    def check(self, names: Sequence[str]) -> None:
        """Refuses what cannot be read before anything is.

        Raises:
            ConfigError: no text named, or a value out of range.
        """
        if not names:
            raise ConfigError("no text given: name one or more files, or - for standard input")
        if self.max_documents is not None and self.max_documents < 1:
            raise ConfigError(f"--max-documents {self.max_documents}: give at least 1")

    def texts(self, names: Sequence[str]) -> list[str]:
        """The documents to score.

        Raises:
            ConfigError: no text named, or a value out of range.
            DataError: a place that holds no usable text.
        """
        self.check(names)
        from textdiff.data.detokenize import detokenizer

        change = detokenizer(self.detokenizer)
        texts = islice(read_documents(names, self.text_column), self.max_documents)
        return [change(text) for text in texts]


def state_path(name: str | None) -> Path | None:
    """The file that `--state` names, in a folder that exists.

    Raises:
        ConfigError: it cannot be written there.
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise ConfigError(f"--state {name} is a folder; name a file")
    return path
