"""A causal language model of transformers as a judge.

Letters: B texts of a batch, S their longest token sequence, V the judge's vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from textdiff.data.backend import text_backends
from textdiff.data.losses import encode_checked
from textdiff.data.tokenizer import auto_tokenizer
from textdiff.errors import CheckpointError, DataError, first_line
from textdiff.evaluate.judges import Judgement, Progress
from textdiff.export.loading import DTYPES, default_device
from textdiff.models.devices import to_device
from textdiff.storage import file_hash

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Window:
    """A stretch of one text's tokens that the judge reads at once.

    Attributes:
        text: index of the text.
        ids: what is read, the beginning-of-text token included.
        given: leading tokens that are read and not scored.
    """

    text: int
    ids: list[int]
    given: int


@dataclass(frozen=True)
class CausalJudge:
    """A causal LM with its tokenizer.

    A judge with a beginning-of-text token reads it before every text, and scores the text's first
    token after it. Without one the first token is context and not scored.

    Attributes:
        name: as the user named it.
        folder: where its files are.
        model: the network, in evaluation mode.
        tokenizer: its tokenizer.
        backend: what encodes texts for it; text never becomes a special token.
        bos: id of the beginning-of-text token; None: it has none.
        context: tokens that it reads at once; None: any number.
        batch_tokens: tokens per network call, padding included.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerFast
    backend: Tokenizer
    bos: int | None
    context: int | None
    batch_tokens: int

    @classmethod
    def load(
        cls, name: str, folder: Path, device: str | None, dtype: str, batch_tokens: int
    ) -> "CausalJudge":
        """Load a judge.

        Raises:
            CheckpointError: it is not a causal LM, or a file is missing or damaged.
        """
        tokenizer, backend = _load_tokenizer(name, folder)
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except Exception as error:
            raise CheckpointError(
                f"judge {name} cannot be loaded as a causal LM ({first_line(error)})",
                code="judge_weights",
            ) from None
        rows = model.get_input_embeddings().num_embeddings
        bos = tokenizer.bos_token_id
        bos = bos if bos is not None and bos < rows else None
        context = getattr(model.config, "max_position_embeddings", None)
        model = model.to(device or default_device()).eval()
        return cls(name, folder, model, tokenizer, backend, bos, context, batch_tokens)

    def judge(self, texts: Sequence[str], progress: Progress) -> Judgement:
        """See `Judge`."""
        ids, first_bytes = self._encode(texts)
        windows = [window for text, row in enumerate(ids) for window in self._windows(text, row)]
        nats = np.zeros(len(texts))
        done = 0
        for batch in self._batches(windows):
            for window, value in zip(batch, self._nats(batch), strict=True):
                nats[window.text] += value
            done += len(batch)
            progress(done, len(windows))
        lost = 0 if self.bos is not None else 1
        sizes = np.array([max(0, len(row) - lost) for row in ids], dtype=np.float64)
        size_bytes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
        per_text = np.bincount([w.text for w in windows], minlength=len(texts))
        return Judgement(
            nats,
            sizes,
            size_bytes - lost * first_bytes,
            int((per_text > 1).sum()),
            len(encode_checked(self.tokenizer, texts).losses),
        )

    def features(self, texts: Sequence[str], progress: Progress) -> NDArray[np.float32]:
        """See `Judge`; a text longer than the context is read as far as that goes."""
        rows, _ = self._encode(texts)
        before = [] if self.bos is None else [self.bos]
        windows = [
            Window(text, [*before, *row][: self.context], 0)
            for text, row in enumerate(rows)
            if before or row
        ]
        if len(windows) < len(texts):
            raise DataError("an empty text has no features under a judge without a first token")
        rows_of: dict[int, Tensor] = {}
        for batch in self._batches(windows):
            ids, real = self._padded(batch)
            with torch.inference_mode():
                hidden = self.model.base_model(
                    input_ids=ids, attention_mask=real, use_cache=False
                ).last_hidden_state
            last = hidden[torch.arange(len(batch)), real.sum(1) - 1].float().cpu()
            rows_of |= {window.text: row for window, row in zip(batch, last, strict=True)}
            progress(len(rows_of), len(windows))
        stacked: NDArray[np.float32] = torch.stack([rows_of[t] for t in range(len(texts))]).numpy()
        return stacked

    def record(self) -> dict[str, Any]:
        """See `Judge`."""
        return {
            "name": self.name,
            "kind": "causal LM",
            "model_sha256": file_hash(*sorted(self.folder.glob("*.safetensors"))),
            "tokenizer_sha256": file_hash(
                *(path for name in _VOCABULARIES if (path := self.folder / name).is_file())
            ),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "context": self.context,
            "first_token": "scored after the beginning-of-text token"
            if self.bos is not None
            else "not scored",
        }

    # --- inside ---

    def _encode(self, texts: Sequence[str]) -> tuple[list[list[int]], NDArray[np.float64]]:
        """Return the token ids of texts, and the bytes of each one's first token."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        rows = self.model.get_input_embeddings().num_embeddings
        for text, encoding in zip(texts, encodings, strict=True):
            if max(encoding.ids, default=0) >= rows:
                raise DataError(
                    f"judge {self.name}: its tokenizer has ids beyond the {rows} rows of its "
                    f"network (in {text!r:.40}): the files do not belong together",
                    code="judge_tokenizer_of_another",
                )
        first = [
            len(text[: encoding.offsets[0][1]].encode()) if encoding.ids else 0
            for text, encoding in zip(texts, encodings, strict=True)
        ]
        return [encoding.ids for encoding in encodings], np.array(first, dtype=np.float64)

    def _windows(self, text: int, row: list[int]) -> Iterator[Window]:
        """Yield the windows of one text: the first from its beginning, later ones half new."""
        ids = row if self.bos is None else [self.bos, *row]
        if len(ids) < 2:
            return
        size = self.context or len(ids)
        ends = [min(size, len(ids))]
        while ends[-1] < len(ids):
            ends.append(min(ends[-1] + max(1, size // 2), len(ids)))
        for scored, end in pairwise([1, *ends]):
            start = max(0, end - size)
            yield Window(text, ids[start:end], scored - start)

    def _batches(self, windows: Sequence[Window]) -> Iterator[list[Window]]:
        """Yield windows of similar lengths together, the longest first."""
        batch: list[Window] = []
        for window in sorted(windows, key=lambda w: -len(w.ids)):
            if batch and (len(batch) + 1) * len(batch[0].ids) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    def _padded(self, batch: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """Return ids [B, S] and 1 where they are real; padding comes last and is not read."""
        rows = [torch.tensor(window.ids) for window in batch]
        ids = pad_sequence(rows, batch_first=True)  # [B, S]
        real = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # [B, S]
        return to_device(ids, self.model.device), to_device(real, self.model.device)

    @torch.inference_mode()
    def _nats(self, batch: Sequence[Window]) -> list[float]:
        """Return minus the log-likelihood of the new tokens of each window."""
        ids, real = self._padded(batch)
        logits = self.model(input_ids=ids, attention_mask=real, use_cache=False).logits  # [B, S, V]
        values = []
        for row, window in enumerate(batch):  # a row at a time: [S, V] in float32, not [B, S, V]
            new = slice(window.given, len(window.ids))
            before = logits[row, window.given - 1 : len(window.ids) - 1]
            wide = before if before.dtype == torch.float64 else before.float()
            nats = nn.functional.cross_entropy(wide, ids[row, new], reduction="none")
            values.append(float(nats.double().sum()))
        return values


def _load_tokenizer(name: str, folder: Path) -> tuple[PreTrainedTokenizerFast, Tokenizer]:
    """Load a judge's tokenizer, and its backend that makes no special tokens of text."""
    try:
        # Without these transformers makes up an empty tokenizer for some architectures.
        if not any((folder / file).is_file() for file in _VOCABULARIES):
            raise FileNotFoundError("there is none of " + ", ".join(_VOCABULARIES))
        tokenizer = auto_tokenizer(folder, local_files_only=True)
        backend = Tokenizer.from_str(text_backends(tokenizer).first)
    except Exception as error:
        raise CheckpointError(
            f"judge {name}: its tokenizer cannot be loaded ({first_line(error)}); a judge needs "
            "the files of a fast tokenizer (tokenizer.json) beside its weights",
            code="judge_tokenizer",
        ) from None
    backend.encode_special_tokens = True
    return tokenizer, backend
