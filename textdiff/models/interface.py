"""The network as the rest of textdiff uses it: our own Transformer, or one of transformers.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N selected positions, V vocabulary.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .cache import CacheSlice, KVCache
from .layers import TokenExponents
from .layout import FULL, Layout
from .self_conditioning import Previous, SelfConditioning


class Denoiser(nn.Module):
    """Network that reads noisy tokens and predicts clean ones.

    Attributes:
        config: its configuration, with `vocab_size`, `mask_token_id`, `excluded_token_ids` and
            `diffusion`, the family it was trained for.
        dtype: that of its first weights.
        block_dtype: dtype of the blocks' matrices, where it is another one.
        blocks: Transformer blocks, which are compiled, sharded and recomputed one by one.
        output_layer: head; maps what `hidden` returns to raw logits [..., V].
        exponents: parameters of a learned schedule; None: the schedule has none.
        self_conditioning: what reads earlier predictions; None: the network has no such input.
    """

    config: PreTrainedConfig
    dtype: torch.dtype
    block_dtype: torch.dtype | None = None
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
        positions: Tensor | None = None,
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
            positions: [N] flat indices into B * L at which they are wanted; None: everywhere.
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
