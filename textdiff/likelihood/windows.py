"""How a text becomes scored windows.

Documents are scored one by one: each is cut into windows of the model's length, and every token
that is to be scored is scored exactly once. No special token is inserted, except that on request
every document is followed by its end-of-text token, scored but not counted. By default windows
follow each other and the last one is shorter: a window sees nothing of the one before it, so the
bound is of the text under "windows are independent". With a stride they overlap: what an earlier
window has scored is context in a later one, visible and never noisy. Text that is given rather than
scored (a prompt, what surrounds a gap) is context in the same way.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textdiff.data import Loss
from textdiff.errors import ConfigError, DataError

Tokens = NDArray[np.int64]
Scored = NDArray[np.bool_]


@dataclass(frozen=True)
class Windows:
    """W scored windows of D documents.

    Attributes:
        tokens: one int64 array per window.
        document: [W] int64, the document each window belongs to, ascending.
        index: [W] int64, the window's place in its document.
        document_tokens: [D] tokens of each document that are scored.
        document_bytes: [D] UTF-8 bytes of what is scored of each document.
        scored: one bool array per window, False at context; None: everything is scored.
        text_digest: hash of the scored texts; empty if unknown.
        ends: [W] int64, the place of the document's end-of-text token in each window, -1 where it
            is in another; None: ends are not scored.
        rest: [W] int64, positions that follow a window's tokens, masked and unscored; None: none.
        losses: by document, what the tokens of its scored text do not give back: the bound of such
            a document is not one on its text.
        unknown: id of the unknown token, which is never scored; None: none is there.
    """

    tokens: list[Tokens]
    document: Tensor
    index: Tensor
    document_tokens: Tensor
    document_bytes: Tensor
    scored: list[Scored] | None = None
    text_digest: str = ""
    ends: Tensor | None = None
    rest: Tensor | None = None
    losses: Mapping[int, Loss] = field(default_factory=dict)
    unknown: int | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """[W] int64, positions of each window."""
        return self._sizes if self.rest is None else self._sizes + self.rest

    @cached_property
    def _sizes(self) -> Tensor:
        """[W] int64, tokens of each window."""
        return torch.tensor([len(tokens) for tokens in self.tokens])

    def followed(self, rest: Tensor) -> "Windows":
        """The same windows, each followed by `rest` [W] masked and unscored positions."""
        return replace(self, rest=rest)

    def batch(self, which: Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Some windows side by side.

        Args:
            which: indices of the windows.
            pad: id that fills the shorter ones: the mask.

        Returns:
            [B, longest] tokens, which of them are real (bool) and which of those are scored (bool).
        """
        chosen = torch.as_tensor(which)
        at = torch.arange(int(self.lengths[chosen].max()))
        real = at < self.lengths[chosen, None]
        text = at < self._sizes[chosen, None]  # of which what follows is no part
        x0 = torch.full(text.shape, pad)
        x0[text] = torch.from_numpy(np.concatenate([self.tokens[w] for w in which]))
        if self.scored is None:
            return x0, real, text
        scored = torch.zeros_like(text)
        scored[text] = torch.from_numpy(np.concatenate([self.scored[w] for w in which]))
        return x0, real, scored

    @cached_property
    def digest(self) -> str:
        """Hash of the windows: two of the same pose the same problem to any two models.

        What follows a text in its block is a matter of the model, and left out.
        """
        state = hashlib.sha256()
        for w, tokens in enumerate(self.tokens):
            state.update(f"{int(self.document[w])} {int(self.index[w])} {len(tokens)}".encode())
            state.update(tokens.tobytes())
            state.update(b"" if self.scored is None else self.scored[w].tobytes())
        for document, loss in self.losses.items():
            state.update(f"{document} {loss}".encode())
        return state.hexdigest()


def cut_windows(
    documents: Sequence[NDArray[np.int32]],
    texts: Sequence[str],
    length: int,
    clean: Tensor,
    *,
    stride: int | None = None,
    scored: Sequence[Scored] | None = None,
    end: int | None = None,
) -> Windows:
    """Cuts encoded documents into windows.

    Args:
        documents: token ids of each document, without special tokens.
        texts: what is scored of each document as text, for bytes and messages.
        length: the model's sequence length in tokens.
        clean: [V] bool, ids that the model can predict.
        stride: tokens from one window to the next, at most `length`; the overlap is context. None:
            `length`, no overlap.
        scored: [tokens] bool of each document, False at what is given; None: all is scored.
        end: the end-of-text token, which is scored after every document and not counted; None: ends
            are not scored.

    Raises:
        ConfigError: a stride out of range.
        DataError: nothing to score, or tokens outside the model's vocabulary.
    """
    if stride is not None and not 1 <= stride <= length:
        raise ConfigError(f"stride {stride}: give 1 to {length}, the model's sequence length")
    wanted = [np.ones(len(ids), bool) for ids in documents] if scored is None else list(scored)
    tokens: list[Tokens] = []
    masks: list[Scored] = []
    where: list[tuple[int, int]] = []
    ends: list[int] = []
    tail = [] if end is None else [end]
    for d, (text, scores) in enumerate(zip(documents, wanted, strict=True)):
        _refuse_foreign(d, text, clean.numpy())
        ids, mask = np.append(text, tail), np.append(scores, [True] * len(tail))
        spans = _spans(len(ids), length, stride or length)
        for index, (start, fresh, stop) in enumerate(spans):
            mine = mask[start:stop].astype(bool)
            mine[: fresh - start] = False
            if mine.any():
                tokens.append(ids[start:stop].astype(np.int64))
                masks.append(mine)
                where.append((d, index))
                ends.append(stop - start - 1 if stop == len(ids) else -1)
    if not tokens:
        raise DataError("the text has no token to score; give a text with at least one character")
    at = torch.tensor(where)
    return Windows(
        tokens,
        at[:, 0],
        at[:, 1],
        torch.tensor([int(mask.sum()) for mask in wanted]),
        torch.tensor([len(text.encode()) for text in texts]),
        None if all(mask.all() for mask in masks) else masks,
        hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        None if end is None else torch.tensor(ends),
    )


def _spans(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first fresh token, stop) of each window over `count` tokens.

    With a stride below the length the last window is pulled back to full length: more context
    costs nothing.
    """
    done = start = 0
    while done < count:
        stop = min(start + length, count)
        if stride < length:
            start = max(0, stop - length)
        yield start, done, stop
        done, start = stop, start + stride


def _refuse_foreign(document: int, ids: NDArray[np.int32], allowed: Scored) -> None:
    """Refuses tokens that the model cannot predict."""
    inside = ids < len(allowed)
    foreign = ids[~inside] if not inside.all() else ids[~allowed[ids]]
    if foreign.size:
        raise DataError(
            f"document {document + 1} has {foreign.size} token(s) that the model cannot predict "
            f"(the first has id {int(foreign[0])}): it contains characters the tokenizer was not "
            "trained on; remove them, or train with a byte or bpe tokenizer"
        )
