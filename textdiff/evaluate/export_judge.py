"""A textdiff export trained from left to right as a judge: its likelihood is exact."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.judge import Judgement, Progress
from textdiff.export.provenance import model_record
from textdiff.pipeline import TextDiffusion


@dataclass(frozen=True)
class ExportJudge:
    """An autoregressive export; it predicts a text's first token from nothing, so that is scored.

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
        """Loads a judge.

        Raises:
            CheckpointError: a file is missing or damaged.
            ConfigError: its likelihood is not exact.
        """
        model = TextDiffusion.from_pretrained(folder, device, dtype)
        if not model.family.objective.shifted:
            raise ConfigError(
                f"judge {name}: only a bound of its likelihood is known, which would measure the "
                "judge's own looseness; give a causal LM, or an export trained with the objective "
                "ar"
            )
        return cls(name, model, batch_tokens)

    def judge(self, texts: Sequence[str], progress: Progress) -> Judgement:
        """See `Judge`."""
        context = int(self.model.model.config.max_position_embeddings)
        try:
            found = self.model.estimate(
                texts,
                stride=max(1, context // 2),
                batch_tokens=self.batch_tokens,
                progress=progress,
            )
        except DataError as error:
            raise DataError(f"judge {self.name}: {error}") from None
        windows = found.windows
        per_text = windows.document.bincount(minlength=len(texts))
        return Judgement(
            found.nats.mean(0).numpy(),
            windows.document_tokens.double().numpy(),
            windows.document_bytes.double().numpy(),
            int((per_text > 1).sum()),
            len(windows.losses),
        )

    def features(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float32]:
        """See `Judge`."""
        raise ConfigError(
            f"judge {self.name} is a textdiff export, MAUVE takes features of a transformers "
            "causal LM; name one, or leave MAUVE out"
        )

    def record(self) -> dict[str, Any]:
        """See `Judge`."""
        found = model_record(self.model.folder)
        return {
            "name": self.name,
            "kind": "textdiff export, objective ar",
            "model_sha256": found["model_sha256"],
            "tokenizer_sha256": found["tokenizer_sha256"],
            "parameters": sum(p.numel() for p in self.model.model.parameters()),
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
            "context": int(self.model.model.config.max_position_embeddings),
            "first_token": "scored, from nothing before it",
        }
