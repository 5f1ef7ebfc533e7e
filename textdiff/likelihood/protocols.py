"""How a text becomes scored windows.

Documents are scored one by one: each is cut into consecutive windows of the model's length, the
last one shorter, and every token is scored exactly once. No special token is inserted. A window
sees nothing of the one before it, so the bound is of the text under "windows are independent".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textdiff.errors import DataError


@dataclass(frozen=True)
class Windows:
    """W scored windows of D documents.

    Attributes:
        tokens: one int64 array per window.
        document: [W] int64, the document each window belongs to, ascending.
        index: [W] int64, the window's place in its document.
        document_tokens: [D] tokens of each document.
        document_bytes: [D] UTF-8 bytes of each document.
    """

    tokens: list[NDArray[np.int64]]
    document: Tensor
    index: Tensor
    document_tokens: Tensor
    document_bytes: Tensor

    def batch(self, which: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, longest] of some windows, padded, and which of them are real (bool)."""
        longest = max(len(self.tokens[w]) for w in which)
        x0 = torch.full((len(which), longest), pad)
        real = torch.zeros(len(which), longest, dtype=torch.bool)
        for row, w in enumerate(which):
            x0[row, : len(self.tokens[w])] = torch.from_numpy(self.tokens[w])
            real[row, : len(self.tokens[w])] = True
        return x0, real


def cut_windows(
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    length: int,
    clean: Tensor,
) -> Windows:
    """Cuts encoded documents into windows.

    Args:
        documents: token ids of each document, without special tokens.
        texts: the same documents as text, for bytes and messages.
        length: the model's sequence length in tokens.
        clean: [V] bool, ids that the model can predict.

    Raises:
        DataError: nothing to score, or tokens outside the model's vocabulary.
    """
    allowed = clean.numpy()
    tokens: list[NDArray[np.int64]] = []
    where: list[tuple[int, int]] = []
    for d, ids in enumerate(documents):
        foreign = (
            ids[~allowed[ids]]
            if ids.size and ids.max() < len(allowed)
            else ids[ids >= len(allowed)]
        )
        if foreign.size:
            raise DataError(
                f"document {d + 1} has {foreign.size} token(s) that the model cannot predict (the "
                f"first has id {int(foreign[0])}): it contains characters the tokenizer was not "
                "trained on; remove them, or train with a byte or bpe tokenizer"
            )
        for index, start in enumerate(range(0, len(ids), length)):
            tokens.append(ids[start : start + length].astype(np.int64))
            where.append((d, index))
    if not tokens:
        raise DataError("the text has no token to score; give a text with at least one character")
    at = torch.tensor(where)
    return Windows(
        tokens,
        at[:, 0],
        at[:, 1],
        torch.tensor([len(ids) for ids in documents]),
        torch.tensor([len(text.encode()) for text in texts]),
    )
