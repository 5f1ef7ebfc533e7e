"""Attention layouts: which positions see which, in a form that every backend reads.

| kind | query i sees key j when |
|---|---|
| full | always |
| causal | j <= i |
| block_causal | block(j) <= block(i) |
| block_diffusion | see below |

In `block_diffusion` the input is [noisy; clean], 2L long: noisy sees its own noisy block and
earlier clean blocks, clean sees its own and earlier clean blocks (Sec. 3.1, arXiv:2503.09573).

With `causal_context` finished tokens see only those before them, also within their block. In
`block_causal`, `finished` says how many tokens of each row are finished: the others see their whole
block. That is the layout of a network that is trained on its clean stream as well, from left to
right: each of these tokens would otherwise see the one that it predicts.

Document ids confine all of them to documents; a position of id -1 is padding that no other sees.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .devices import to_device

KINDS = ("full", "causal", "block_causal", "block_diffusion")


@dataclass(frozen=True)
class Layout:
    """Attention layout.

    Attributes:
        kind: one of `KINDS`.
        block_size: tokens per block, for the two block kinds.
        document_ids: [B, L] integer ids; None: every row is one document.
        causal_context: whether finished tokens see only those before them, in the two block kinds.
        finished: [B] tokens of each row that are finished, for `block_causal` with
            `causal_context`; None: all of them.
        documents: documents and padding of all rows, at most, where each is one run of ids; None:
            they were not counted.
    """

    kind: str = "full"
    block_size: int | None = None
    document_ids: Tensor | None = None
    causal_context: bool = False
    finished: Tensor | None = None
    documents: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown attention layout {self.kind!r}; one of {', '.join(KINDS)}")
        if self.kind.startswith("block") and not self.block_size:
            raise ValueError(f"layout {self.kind} needs a block_size")

    def within(self, document_ids: Tensor | None, documents: int | None = None) -> "Layout":
        """Return the same layout confined to documents, of which there are so many at most."""
        return replace(self, document_ids=document_ids, documents=documents)

    def after(self, finished: Tensor) -> "Layout":
        """Return the same layout of rows of which some tokens [B] are finished."""
        return replace(self, finished=finished) if self.causal_context else self

    @property
    def streams(self) -> int:
        """Copies of the sequence in the input: 2 for block diffusion training."""
        return 2 if self.kind == "block_diffusion" else 1

    @property
    def is_dense(self) -> bool:
        """True where everything sees everything, so that no mask is needed."""
        return self.kind == "full" and self.document_ids is None

    def allows(
        self, query: Tensor, key: Tensor, length: int, finished: Tensor | None = None
    ) -> Tensor:
        """Return whether position `query` sees `key`, by broadcasting; documents aside.

        Args:
            query: integer positions in the (one- or two-stream) input.
            key: likewise.
            length: L, the length of one stream.
            finished: tokens of the query's row that are finished; None: all of them.
        """
        if self.kind == "full":
            return (query >= 0) & (key >= 0)
        if self.kind == "causal":
            return key <= query
        query_block = (query % length) // self.block_size
        key_block = (key % length) // self.block_size
        if self.kind == "block_causal":
            if not self.causal_context:
                return key_block <= query_block
            seen = key <= query
            if finished is None:
                return seen
            return seen | ((key_block <= query_block) & (query >= finished))
        query_clean, key_clean = query >= length, key >= length
        own_noisy = ~query_clean & ~key_clean & (key_block == query_block)
        earlier_clean = key_clean & (key_block < query_block)
        own_clean = query_clean & key_clean & (key_block == query_block)
        if self.causal_context:
            own_clean = own_clean & (key <= query)
        return own_noisy | earlier_clean | own_clean

    def mask(self, total: int, device: torch.device) -> Tensor | None:
        """Return the boolean mask for `total` positions, True where attention is allowed.

        Returns:
            None when dense, [total, total], or [B, 1, total, total] where rows differ. A padding
            position sees itself, so that no row of a softmax is empty.
        """
        if self.is_dense:
            return None
        at = torch.arange(total, device=device)
        finished = None
        if self.finished is not None:
            finished = to_device(self.finished, device)[:, None, None]
        allowed = self.allows(at[:, None], at[None, :], total // self.streams, finished)
        if self.document_ids is None:
            return allowed if finished is None else allowed.unsqueeze(1)
        ids = self.document_ids.repeat(1, self.streams)
        same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
        return ((allowed & same) | (at[:, None] == at[None, :])).unsqueeze(1)

    def mask_mod(self, total: int):
        """Return the same mask as a FlexAttention `mask_mod(batch, head, query, key)`."""
        length = total // self.streams
        ids = None if self.document_ids is None else self.document_ids.repeat(1, self.streams)
        done = self.finished

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            visible = self.allows(query, key, length, None if done is None else done[batch])
            if ids is None:
                return visible
            same = (ids[batch, query] == ids[batch, key]) & (ids[batch, key] >= 0)
            return (visible & same) | (query == key)

        return allowed


FULL = Layout()
CAUSAL = Layout("causal")


def shift_right(ids: Tensor, start: int, document_ids: Tensor | None = None) -> Tensor:
    """Shift tokens [B, L] right by one position, for left-to-right prediction in causal layouts.

    Args:
        ids: tokens.
        start: first token of every document.
        document_ids: [B, L], or None where a row is one document.
    """
    moved = functional.pad(ids[:, :-1], (1, 0), value=start)
    if document_ids is None:
        return moved
    before = functional.pad(document_ids[:, :-1], (1, 0), value=-1)
    return moved.masked_fill(document_ids != before, start)


def hide_starts(ids: Tensor, positions: Tensor, document_ids: Tensor | None) -> Tensor | None:
    """Return document ids that hide the first input of documents whose first token is fixed.

    Args:
        ids: [B, L] tokens.
        positions: [N] flat indices of the tokens that are predicted.
        document_ids: [B, L], or None where a row is one document.
    """
    predicted = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
    predicted[positions] = True
    documents = torch.zeros_like(ids) if document_ids is None else document_ids
    first = documents != functional.pad(documents[:, :-1], (1, 0), value=-1)  # [B, L]
    hidden = first & ~predicted.view(ids.shape)
    if document_ids is None and not bool(hidden.any()):
        return None
    return documents.masked_fill(hidden, -1)


Places = Tensor | Callable[[], Tensor] | None
"""Flat indices into B * L, or a function that returns them when they are needed; None: all."""


def flat_places(noisy: Places, clean: Tensor | None, length: int) -> Tensor | None:
    """Return the flat indices of places, and with those of a clean stream into both streams.

    Args:
        noisy: [N] of the noisy stream.
        clean: [M] of the clean stream; None: none of them.
        length: L, the length of one stream.

    Returns:
        [N] indices into B * L, or [N + M] into B * 2L, or None.
    """
    if callable(noisy):
        noisy = noisy()
    if noisy is None or clean is None:
        return noisy
    return torch.cat([noisy + noisy // length * length, clean + (clean // length + 1) * length])


def noise_levels(levels: Tensor, layout: Layout, length: int) -> tuple[Tensor, Tensor | None]:
    """Return the distinct noise levels [B, S] of a call, and which each position reads, [T].

    Args:
        levels: [B, 1] or [B, blocks] total noise.
        layout: the clean stream of two has zero noise, or a cache would not be exact.
        length: L tokens of one stream.

    Returns:
        The second is None where all positions read the only level.
    """
    if layout.streams == 1 and levels.shape[1] == 1:
        return levels, None
    size = layout.block_size or length
    index = torch.arange(length, device=levels.device) // size
    levels = levels.expand(len(levels), -(-length // size))
    if layout.streams == 2:
        index = torch.cat([index, torch.full_like(index, levels.shape[1])])
        levels = torch.cat([levels, levels.new_zeros(len(levels), 1)], dim=1)
    return levels, index


def level_runs(index: Tensor | None, layout: Layout, length: int) -> tuple[Tensor | None, int]:
    """Return the noise level of each run of positions, [R], and the positions of a run.

    Where blocks divide the sequence, each is a run, and modulations are spread from runs to
    positions by broadcasting. On a CPU, which adds up gradients in another order then, and in an
    odd layout, every position is a run.

    Args:
        index: [T] which level each position reads; None: all read one.
        layout: who sees whom.
        length: L tokens of one stream.
    """
    size = layout.block_size or length
    if index is None or index.device.type == "cpu" or length % size:
        return index, 1
    return index[::size], size


def training_layout(block_size: int | None, causal_context: bool = False) -> Layout:
    """Return the layout of training and likelihood: in blocks, with the clean context."""
    if block_size is None:
        return FULL
    return Layout("block_diffusion", block_size, causal_context=causal_context)


def sampling_layout(block_size: int | None, causal_context: bool = False) -> Layout:
    """Return the layout of generation: earlier blocks are finished, later ones invisible."""
    if block_size is None:
        return FULL
    return Layout("block_causal", block_size, causal_context=causal_context)
