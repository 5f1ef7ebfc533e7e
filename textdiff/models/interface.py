"""The network as the rest of textdiff uses it: our own Transformer, or one of transformers.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N selected positions, M places of the
clean stream, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .cache import CacheSlice, KVCache
from .layers import Previous, SelfConditioning, TokenExponents
from .layout import FULL, Layout, Places


class Denoiser(nn.Module):
    """Network that reads noisy tokens and predicts clean ones.

    Attributes:
        config: its configuration, with `vocab_size`, `mask_token_id`, `excluded_token_ids` and
            `diffusion`, the family it was trained for.
        dtype: that of its first weights.
        block_dtype: dtype of the blocks' matrices, where it is another one.
        cuda_graphs: whether generation on a GPU may record calls of `hidden` and replay them.
        blocks: Transformer blocks, which are compiled, sharded and recomputed one by one.
        output_layer: head; maps what `hidden` returns to raw logits [..., V].
        exponents: parameters of a learned schedule; None: the schedule has none.
        self_conditioning: what reads earlier predictions; None: the network has no such input.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    block_dtype: torch.dtype | None = None
    cuda_graphs: bool = True
    blocks: nn.ModuleList
    output_layer: nn.Module
    exponents: TokenExponents | None
    self_conditioning: SelfConditioning | None

    @property
    def context(self) -> int:
        """Tokens that it was trained to see at once."""
        return int(self.config.max_position_embeddings)

    @property
    def time_conditioning(self) -> bool:
        """True where the noise level enters."""
        return bool(self.config.time_conditioning)

    def block_matrices(self) -> list[nn.Parameter]:
        """Return the blocks' matrices that multiply every position, not those of the noise level.

        Muon trains them.
        """
        named = self.blocks.named_parameters()
        return [p for name, p in named if p.ndim == 2 and "adaLN" not in name]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of queries, keys and values: autocast's, or that of the blocks."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.block_dtype or self.dtype

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Places = None,
        cache: CacheSlice | None = None,
        context_positions: Tensor | None = None,
        previous: Previous | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return hidden states for the head: of the noisy stream, and where asked of the clean one.

        Args:
            input_ids: [B, L] noisy tokens.
            context_ids: [B, L] clean tokens, for the `block_diffusion` layout alone.
            sigma: [B] or [B, blocks] total noise; read only with `time_conditioning`.
            layout: who sees whom.
            positions: [N] flat indices into B * L at which they are wanted; None: everywhere. A
                function that returns them is called once what needs no positions is queued.
            cache: keys and values of the tokens before these, to which theirs are added; it fixes
                their positions and replaces the layout's mask.
            context_positions: [M] flat indices into B * L of the clean stream, whose hidden states
                follow those at `positions`, which are given too; None: its last layer computes keys
                and values alone. It is passed only where it is needed.
            previous: earlier predictions of noisy tokens, for networks with `self_conditioning`;
                None, as before the first one: nothing is added. It is passed only to those.

        Returns:
            [N, H], or [B, L, H], or [N + M, H], and conditions of the head of that shape, or None.
        """
        raise NotImplementedError

    def expected(self, log_x0: Tensor) -> Tensor:
        """Return expected embeddings [N, H] of clean tokens of log-probabilities [N, V]."""
        raise NotImplementedError

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Return an empty cache for `slots` rows of `capacity` tokens (a ring for longer ones)."""
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write configuration and weights."""
        raise NotImplementedError

    def gradient_checkpointing_enable(self) -> None:
        """Recompute blocks in the backward pass."""
        raise NotImplementedError


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

    Mostly a position is predicted at itself. Where outputs are about the next token, as in networks
    that were trained from left to right, it is predicted at the place before.

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

    def first(self, count: int) -> "Reads":
        """Return the places that predict the first positions alone."""
        index, cut = self.index, len(self.noisy) - count
        if index is not None:
            index = index[:count]
            index = torch.where(index < len(self.noisy), index, index - cut)
        return Reads(self.noisy[:count], self.clean, index)

    def ordered(self, states: Tensor) -> Tensor:
        """Return the states [N, ...] of the positions, of those at N + M places."""
        if self.index is not None:
            return states[self.index]
        return states if self.clean is None else states[: len(self.noisy)]
