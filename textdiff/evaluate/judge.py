"""Judges: language models that say how likely texts are, token by token from left to right.

| judge | likelihood | how |
|---|---|---|
| a causal LM of transformers | exact | `causal_judge.py` |
| a textdiff export trained with the objective `ar` | exact | `export_judge.py` |

Whichever it is, a text is encoded anew in the judge's tokens, every judge token of it is given a
likelihood once, the end of the text none, and a text longer than the judge's context is read in
windows whose second half alone is new.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import CheckpointError
from textdiff.export.loading import locate, read_json

FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]
"""What is fetched of a judge on the hub: no pickle, no weights of other frameworks."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Judgement:
    """What a judge makes of T texts.

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
        """The likelihood of texts; what one gets does not depend on the others.

        Args:
            texts: the texts, empty ones too.
            progress: told the texts that are done, and all.

        Raises:
            DataError: a text that the judge's tokenizer cannot encode.
        """

    def features(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float32]:
        """[T, D] one vector per text: the last hidden state at its last token.

        Raises:
            ConfigError: this judge has none to give.
        """

    def record(self) -> dict[str, Any]:
        """What identifies the judge, and how it reads: for the provenance of a result."""


def load_judge(name: str, device: str | None, dtype: str, batch_tokens: int) -> Judge:
    """The judge of that name.

    Args:
        name: folder of a causal LM in Hugging Face layout or of a textdiff export, or a hub id.
        device: torch device; None: the fastest.
        dtype: of the network; likelihoods are normalised in float32 or wider in any case.
        batch_tokens: tokens per network call, padding included.

    Raises:
        CheckpointError: there is no such judge, or a file of it is missing or damaged.
        ConfigError: an export without an exact likelihood.
    """
    try:
        folder = locate(name, FILES)
        if not (folder / "config.json").is_file():
            raise CheckpointError("holds no config.json; give the folder of a causal LM or export")
        kind = read_json(folder / "config.json").get("model_type")
    except CheckpointError as error:
        raise CheckpointError(f"judge {name}: {error}") from None
    if kind == "textdiff":
        from textdiff.evaluate.export_judge import ExportJudge

        return ExportJudge.load(name, folder, device, dtype, batch_tokens)
    from textdiff.evaluate.causal_judge import CausalJudge

    return CausalJudge.load(name, folder, device, dtype, batch_tokens)
