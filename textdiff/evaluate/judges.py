"""Judges: language models that say how likely texts are, token by token from left to right.

| judge | likelihood | how |
|---|---|---|
| a causal LM of transformers | exact | `causal_judge.py` |
| a textdiff export trained with the objective `ar` | exact | `ExportJudge` |

Whichever it is, a text is encoded anew in the judge's tokens. Every judge token of it is given a
likelihood once, the end of the text none. A text longer than the judge's context is read in windows
whose second half alone is new.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import CheckpointError, ConfigError, DataError
from textdiff.export.loading import locate, read_json
from textdiff.export.records import model_record
from textdiff.models.half_blocks import dtype_name
from textdiff.pipeline import TextDiffusion

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""Files fetched of a judge on the hub: no pickle, no weights of other frameworks."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judgement:
    """Likelihoods of T texts under a judge.

    Attributes:
        nats: [T] minus the log-likelihood of what is scored of each text.
        tokens: [T] judge tokens that are scored.
        bytes: [T] UTF-8 bytes of what is scored.
        windowed: texts longer than the judge's context.
        lossy: texts that the judge's tokens do not give back: what is judged is not all of them,
            and a figure per byte is not defined.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]
    bytes: NDArray[np.float64]
    windowed: int
    lossy: int = 0


class Judge(Protocol):
    """Any model that gives texts a likelihood."""

    def judge(self, texts: Sequence[str], progress: Progress) -> Judgement:
        """Return the likelihood of texts, each independent of the others.

        Args:
            texts: the texts, empty ones too.
            progress: called with the texts that are done, and all.

        Raises:
            DataError: a text that the judge's tokenizer cannot encode.
        """

    def features(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float32]:
        """Return one vector per text, [T, D]: the last hidden state at its last token.

        Raises:
            ConfigError: this judge has none.
        """

    def record(self) -> dict[str, Any]:
        """Return what identifies the judge, and how it reads, for the provenance of a result."""


@dataclass(frozen=True)
class ExportJudge:
    """A textdiff export trained from left to right: its likelihood is exact.

    It predicts a text's first token unconditionally, so that is scored.

    Attributes:
        name: as the user named it.
        model: the export.
        batch_tokens: tokens per network call, padding included.
    """

    name: str
    model: TextDiffusion
    batch_tokens: int

    @classmethod
    def load(
        cls, name: str, folder: Path, device: str | None, dtype: str, batch_tokens: int
    ) -> "ExportJudge":
        """Load a judge.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: its likelihood is not exact.
        """
        model = TextDiffusion.from_pretrained(folder, device, dtype)
        if not model.family.objective.shifted:
            raise ConfigError(
                f"judge {name}: only a bound of its likelihood is known, which would measure the "
                "judge's own looseness; give a causal LM, or an export trained with the objective "
                "ar",
                code="judge_without_likelihood",
            )
        return cls(name, model, batch_tokens)

    def judge(self, texts: Sequence[str], progress: Progress) -> Judgement:
        """See `Judge`."""
        context = self.model.model.context
        try:
            estimates = self.model.estimate(
                texts,
                stride=max(1, context // 2),
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
        except DataError as error:
            raise DataError(f"judge {self.name}: {error}") from None
        windows = estimates.windows
        per_text = windows.document.bincount(minlength=len(texts))
        return Judgement(
            estimates.nats.mean(0).numpy(),
            windows.document_tokens.double().numpy(),
            windows.document_bytes.double().numpy(),
            int((per_text > 1).sum()),
            len(windows.losses),
        )

    def features(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float32]:
        """See `Judge`."""
        raise ConfigError(
            f"judge {self.name} is a textdiff export, MAUVE takes features of a transformers "
            "causal LM; name one, or leave MAUVE out",
            code="judge_without_features",
        )

    def record(self) -> dict[str, Any]:
        """See `Judge`."""
        origin = model_record(self.model.folder)
        return {
            "name": self.name,
            "kind": "textdiff export, objective ar",
            "model_sha256": origin["model_sha256"],
            "tokenizer_sha256": origin["tokenizer_sha256"],
            "parameters": sum(p.numel() for p in self.model.model.parameters()),
            "dtype": dtype_name(self.model.model),
            "context": self.model.model.context,
            "first_token": "scored, from nothing before it",
        }


def load_judge(name: str, device: str | None, dtype: str, batch_tokens: int) -> Judge:
    """Load the judge of that name.

    Args:
        name: folder of a causal LM in Hugging Face layout or of a textdiff export, or a hub id.
        device: torch device; None: the fastest.
        dtype: of the network; likelihoods are normalised in float32 or wider in any case.
        batch_tokens: tokens per network call, padding included.

    Raises:
        CheckpointError: the judge does not exist, or a file of it is missing or damaged.
        ConfigError: an export without an exact likelihood.
    """
    try:
        folder = locate(name, FILES)
        if not (folder / "config.json").is_file():
            raise CheckpointError("holds no config.json; give the folder of a causal LM or export")
        kind = read_json(folder / "config.json").get("model_type")
    except CheckpointError as error:
        raise CheckpointError(f"judge {name}: {error}", code="judge_not_found") from None
    if kind == "textdiff":
        return ExportJudge.load(name, folder, device, dtype, batch_tokens)
    from textdiff.evaluate.causal_judge import CausalJudge

    return CausalJudge.load(name, folder, device, dtype, batch_tokens)
