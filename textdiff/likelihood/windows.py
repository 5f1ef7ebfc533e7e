"""Scored windows of texts, and how a document ends.

Documents are scored one by one: each is cut into windows of the model's length, and every token
that is to be scored is scored exactly once. No special token is inserted, except that on request
every document is followed by its end-of-text token, scored but not counted. By default windows
follow each other and the last one is shorter: a window does not attend to the one before it, so
the bound is of the text under "windows are independent". With a stride they overlap: what an
earlier window has scored is context in a later one, visible and never noisy. Text that is fixed
rather than scored (a prompt, what surrounds a gap) is context in the same way.

A model in blocks has no way to express that a block is short. What follows the last token of a
document in its block is therefore present, masked at every noise level and never scored: the
network reads the same masks wherever in the block the document ends, so that they carry no
information about its length. Were the block cut off there, predictions would be conditional on
where the document stops at no charge. A network with one block for the whole sequence is by default
conditional on the length, as in the published evaluations. Once the end is scored, its context is a
block like any other.

Uniform and hybrid noise have no state in which a token is still to be generated: every noisy token
is a token, and what it might be would have to be summed over.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from textdiff.data.losses import Loss
from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, DataError

Tokens = NDArray[np.int64]
Scored = NDArray[np.bool_]


NOTHING_TO_SCORE = "the text has no token to score; give a text with at least one character"


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
        filled: whether end-of-text tokens, which are scored, fill a text's last block.
        noise: [D] int64 key of each document's noise, which documents of one key have in common;
            None: every document's number.
        origin: [W] int64, the place in each window that positions of noise count from; None: 0.
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
    filled: bool = False
    noise: Tensor | None = None
    origin: Tensor | None = None

    @cached_property
    def noise_keys(self) -> Tensor:
        """[W] int64, the key of each window's noise."""
        return self.document if self.noise is None else self.noise[self.document]

    @cached_property
    def origins(self) -> Tensor:
        """[W] int64, the place that positions of noise count from."""
        return torch.zeros_like(self.document) if self.origin is None else self.origin

    @cached_property
    def lengths(self) -> Tensor:
        """[W] int64, positions of each window."""
        return self.sizes if self.rest is None else self.sizes + self.rest

    @cached_property
    def sizes(self) -> Tensor:
        """[W] int64, tokens of each window."""
        return torch.tensor([len(tokens) for tokens in self.tokens])

    def batch(self, which: Sequence[int], pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return some windows side by side.

        Args:
            which: indices of the windows.
            pad: id that fills the shorter ones: the mask.

        Returns:
            [B, longest] tokens, which of them are real (bool) and which of those are scored (bool).
        """
        chosen = torch.as_tensor(which)
        at = torch.arange(int(self.lengths[chosen].max()))
        real = at < self.lengths[chosen, None]  # [B, longest]
        text = at < self.sizes[chosen, None]  # [B, longest], False at what follows a text
        x0 = torch.full(text.shape, pad)
        x0[text] = torch.from_numpy(np.concatenate([self.tokens[w] for w in which]))
        if self.scored is None:
            return x0, real, text
        scored = torch.zeros_like(text)
        scored[text] = torch.from_numpy(np.concatenate([self.scored[w] for w in which]))
        return x0, real, scored

    def most_scored(self, family: Family) -> int:
        """Return the most tokens of any block that are scored."""
        if self.scored is None:
            return family.blocks(max(len(tokens) for tokens in self.tokens)).size
        size = family.block_size
        return max(
            int(np.add.reduceat(scored, np.arange(0, len(scored), size or len(scored))).max())
            for scored in self.scored
        )

    @cached_property
    def digest(self) -> str:
        """Hash of the windows, without what follows a text in its block: that is the model's."""
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
    """Cut encoded documents into windows.

    Args:
        documents: token ids of each document, without special tokens.
        texts: scored text of each document.
        length: the model's sequence length.
        clean: [V] bool, ids that the model can predict.
        stride: tokens from one window to the next; the overlap is context. None: no overlap.
        scored: [tokens] bool of each document, False at fixed text; None: all is scored.
        end: end-of-text token, scored after every document and not counted; None: not scored.

    Raises:
        ConfigError: a stride out of range.
        DataError: nothing to score, or foreign tokens.
    """
    _refuse_stride(stride, length)
    wanted = scored or [np.ones(len(ids), bool) for ids in documents]
    cuts = list(_cut(documents, wanted, length, stride or length, clean.numpy(), end))
    if not cuts:
        raise DataError(NOTHING_TO_SCORE, code="no_token_to_score")
    return Windows(
        [cut.tokens for cut in cuts],
        torch.tensor([cut.document for cut in cuts]),
        torch.tensor([cut.number for cut in cuts]),
        torch.tensor([int(mask.sum()) for mask in wanted]),
        torch.tensor([len(text.encode()) for text in texts]),
        None if all(cut.scored.all() for cut in cuts) else [cut.scored for cut in cuts],
        hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        None if end is None else torch.tensor([cut.end for cut in cuts]),
    )


def _refuse_stride(stride: int | None, length: int) -> None:
    if stride is not None and not 1 <= stride <= length:
        raise ConfigError(
            f"stride {stride}: give 1 to {length}, the model's sequence length",
            code="stride_out_of_range",
        )


class _Cut(NamedTuple):
    """One window; see `Windows`."""

    tokens: Tokens
    scored: Scored
    document: int
    number: int
    end: int


def _cut(
    documents: Sequence[NDArray[np.int32]],
    wanted: Sequence[Scored],
    length: int,
    stride: int,
    clean: Scored,
    end: int | None,
) -> Iterator[_Cut]:
    """Yield the windows that have a token to score; see `cut_windows`."""
    tail = [] if end is None else [end]
    for d, (text, scores) in enumerate(zip(documents, wanted, strict=True)):
        _refuse_foreign(d, text, clean)
        ids, mask = np.append(text, tail), np.append(scores, [True] * len(tail))
        for index, (start, fresh, stop) in enumerate(_spans(len(ids), length, stride)):
            new = mask[start:stop].astype(bool)
            new[: fresh - start] = False
            if new.any():
                place = stop - start - 1 if stop == len(ids) else -1
                yield _Cut(ids[start:stop].astype(np.int64), new, d, index, place)


def _spans(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first fresh token, stop) of each window over `count` tokens.

    With a stride below the length the last window is pulled back to full length: more context is
    free.
    """
    done = start = 0
    while done < count:
        stop = min(start + length, count)
        if stride < length:
            start = max(0, stop - length)
        yield start, done, stop
        done, start = stop, start + stride


def _refuse_foreign(document: int, ids: NDArray[np.int32], allowed: Scored) -> None:
    """Refuse tokens that the model cannot predict."""
    inside = ids < len(allowed)
    foreign = ids[~inside] if not inside.all() else ids[~allowed[ids]]
    if foreign.size:
        raise DataError(
            f"document {document + 1} has {foreign.size} token(s) that the model cannot predict "
            f"(the first has id {int(foreign[0])}): it contains characters the tokenizer was not "
            "trained on; remove them, or train with a byte or bpe tokenizer",
            code="foreign_tokens",
        )


def stays_masked(windows: Windows, family: Family) -> bool:
    """Return whether masks follow a document in its last block; else nothing does."""
    in_blocks = family.block_size is not None or windows.ends is not None
    return in_blocks and family.process.masks_evenly


def with_rest(windows: Windows, family: Family, context: int) -> Windows:
    """Return the windows with the rest of their last block, as a family and its network need it.

    Args:
        windows: what is scored.
        family: its process and block size.
        context: tokens that the network reads at once, which may cut its last block short.

    Raises:
        ConfigError: ends are to be scored, and the process has no mask.
    """
    if windows.ends is not None and not windows.filled and not family.process.masks_evenly:
        kind = type(family.process).__name__.lower()
        raise ConfigError(
            f"the end of a text cannot be scored under {kind} noise: what follows it in its block "
            "would have to be summed over, since it cannot be masked; leave end_of_text "
            "(--end-of-text) out, which gives a bound conditional on the length",
            code="end_needs_masks",
        )
    if windows.filled or not stays_masked(windows, family):
        return windows
    size = family.block_size or context
    lengths = windows.sizes
    whole = (-(-lengths // size) * size).clamp(max=context)
    return replace(windows, rest=whole - lengths)
