"""Places of the hidden states that predict the positions of a batch.

Mostly a position is predicted at itself. Where outputs are about the next token, as in networks
that were trained from left to right, it is predicted at the place before.

Letters: B rows, L positions, N positions that are predicted, M places of the clean stream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout


def left_neighbours(positions: Tensor, length: int, document_ids: Tensor | None = None) -> Tensor:
    """Return the positions whose outputs are about `positions`, if outputs are about what follows.

    That is the one before; the first of a document is read at itself, with nothing before it.

    Args:
        positions: [N] flat indices into B * L.
        length: L.
        document_ids: [B, L], or None where a row is one document.
    """
    first = positions % length == 0
    if document_ids is not None:
        ids = document_ids.flatten()
        first = first | (ids[positions] != ids[(positions - 1).clamp(min=0)])
    return torch.where(first, positions, positions - 1)


@dataclass(frozen=True)
class Reads:
    """Places of the hidden states that predict N positions.

    Attributes:
        noisy: [N] flat indices into the noisy stream.
        clean: [M] flat indices into the clean stream; None: none of them is read.
        index: [N] which of these N + M states predicts each position; None: the first N.
    """

    noisy: Tensor
    clean: Tensor | None = None
    index: Tensor | None = None

    @classmethod
    def of(
        cls, positions: Tensor, shape: torch.Size, layout: Layout, shift: bool, all_clean: bool
    ) -> "Reads":
        """Return the places that predict positions.

        What is before a block is the clean end of the last one, as in generation. Its state is
        computed for every block, needed or not: shapes then depend on no tensor's values.

        Args:
            positions: [N] flat indices into B * L.
            shape: (B, L).
            layout: of one or two streams.
            shift: whether outputs are about the next token.
            all_clean: whether every place of the clean stream is wanted as well, M = B * L.
        """
        (rows, length), device = shape, positions.device
        clean = torch.arange(rows * length, device=device) if all_clean else None
        if not shift:
            return cls(positions, clean)
        before = left_neighbours(positions, length, layout.document_ids)
        if layout.streams == 1:
            return cls(before)
        size = min(layout.block_size, length)
        row, column = positions // length, positions % length
        state = before  # of all clean ones
        if clean is None:
            ends = torch.arange(size - 1, length - 1, size, device=device)  # [blocks - 1]
            clean = (torch.arange(rows, device=device)[:, None] * length + ends).flatten()
            state = row * len(ends) + column // size - 1
        crosses = (before < positions) & (column % size == 0)
        index = torch.arange(len(positions), device=device)
        return cls(before, clean, torch.where(crosses, len(positions) + state, index))

    def ordered(self, states: Tensor) -> Tensor:
        """Return the states [N, ...] of the positions, of those at N + M places."""
        if self.index is not None:
            return states[self.index]
        return states if self.clean is None else states[: len(self.noisy)]
