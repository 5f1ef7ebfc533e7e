"""The denoiser: one pre-norm Transformer for every objective, process and block size.

- Rotary positions on queries and keys; one code attends fully, causally or in blocks (`layout`).
- Two streams in block layouts: [noisy; clean], positions restarting, the clean one at sigma = 0.
- The head runs only at `positions`; logits of a whole batch are never materialised in training.
- adaLN (modulation by the noise level) is optional; with `mlp: gelu, norm: layernorm, adaln: true`
  the parameter table is that of the published SEDD, MDLM and BD3-LM checkpoints, by name.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N selected positions, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from .attention import BACKENDS, prepare, unavailable
from .block import Block, BlockInputs, OutputLayer, embed
from .cache import CacheSlice, KVCache
from .configuration import (
    TextDiffusionConfig,
    check_options,
    cross_entropy,
    initial_exponent,
    resize,
)
from .devices import to_device
from .interface import Denoiser
from .layers import (
    LayerNorm,
    NoiseEmbedding,
    Previous,
    RMSNorm,
    Rotary,
    SelfConditioning,
    TokenEmbedding,
    TokenExponents,
)
from .layout import FULL, Layout, Places, flat_places, level_runs, noise_levels


class TextDiffusionModel(PreTrainedModel, Denoiser):
    """A Transformer denoiser with the Hugging Face interface (save, load, push, Auto classes)."""

    config_class = TextDiffusionConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: TextDiffusionConfig):
        super().__init__(config)
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.sigma_map = NoiseEmbedding(config.conditioning_size) if config.adaln else None
        self.self_conditioning = SelfConditioning(config) if config.self_conditioning else None
        self.blocks = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.output_layer = OutputLayer(config)
        exponent = initial_exponent(config)
        self.exponents = None if exponent is None else TokenExponents(config.vocab_size, exponent)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw unit embeddings and linear maps of variance 1 / (3 inputs); modulate nothing.

        A zero head or zero branches (gates that start at zero, as published), tried at this size,
        learn clearly slower.
        """
        if isinstance(module, TokenEmbedding):
            init.normal_(module.embedding, std=1.0)
        elif isinstance(module, nn.Linear):
            # Marked where they are made: children are initialised before their parents, once.
            gates = getattr(module, "gates", None)
            std = (3 * module.in_features) ** -0.5 if gates is None else 0.0
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
            for gate in gates or ():
                init.ones_(module.bias[gate])
        elif isinstance(module, LayerNorm | RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, TokenExponents):
            init.constant_(module.raw, module.start)

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **options):
        """Take the names of our backends as they are: they do not need transformers' packages."""
        if attn_implementation in BACKENDS:
            return attn_implementation
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **options)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module (its table is `.embedding`)."""
        return self.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        """Return the head's linear map."""
        return self.output_layer.linear

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Give embedding and head another number of rows, as for tokens added to the tokenizer.

        Args:
            new_num_tokens: rows; None: as many as there are.
            pad_to_multiple_of: rows up to a multiple of it are added; they are never predicted.
            mean_resizing: new embeddings have the mean and deviation of the old ones; else they are
                those of an untrained network. New rows of the head are the average of the old ones.

        Returns:
            The embedding.

        Raises:
            ValueError: a special token would be cut off.
        """
        tokens = self.config.vocab_size if new_num_tokens is None else int(new_num_tokens)
        rows = -(-tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        resize(self, tokens, rows, mean_resizing)
        return self.vocab_embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: CacheSlice | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Return raw logits.

        Args:
            input_ids: [B, L] noisy tokens.
            context_ids: [B, L] clean tokens, for the `block_diffusion` layout alone.
            sigma: [B] or [B, blocks] total noise; read only with `time_conditioning`.
            layout: who sees whom.
            positions: [N] flat indices into B * L at which logits are wanted; None: everywhere.
            attention_mask: [B, L], 0 at padding; a shorthand for a layout with document ids.
            cache: keys and values of the tokens before these, to which theirs are added; it fixes
                their positions and replaces the layout's mask.
            labels: [B, L], or [N] with positions, tokens to predict, -100 where none is: `.loss` is
                their cross-entropy, the average over labels.
            **options: `return_dict`, `num_items_in_batch` (labels to divide the loss by),
                `previous` (see the interface), `token_type_ids` (ignored).

        Returns:
            `.logits`: [N, V], or [B, L, V] when `positions` is None; `.loss` with labels. A tuple
            of those where `return_dict` is False.

        Raises:
            ValueError: the attention backend cannot run here, a stream is missing, labels have
                another shape, or an option of other models is asked for.
        """
        check_options(options)
        if input_ids is None:
            raise ValueError("input_ids are missing: give the [B, L] tokens of the noisy texts")
        if attention_mask is not None and not bool(attention_mask.all()):
            layout = layout.within(attention_mask.to(torch.int64) - 1)
        x, condition = self.hidden(
            input_ids, context_ids, sigma, layout, positions, cache, None, options.get("previous")
        )
        logits, loss = self.output_layer(x, condition), None
        if labels is not None:
            loss = cross_entropy(logits, labels, positions, options.get("num_items_in_batch"))
        named, output = options.get("return_dict"), MaskedLMOutput(loss=loss, logits=logits)
        return output if named or (named is None and self.config.return_dict) else output.to_tuple()

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
        """Return hidden states for the head; arguments as for `forward` and of the interface.

        The last block computes what its attention needs everywhere, and the rest of itself only at
        `positions` and `context_positions`.

        Returns:
            [N, H], or [B, L, H], before the final norm, and conditions of the head, or None.
        """
        self._check(input_ids, context_ids, layout)
        batch, length = input_ids.shape
        tokens = input_ids if context_ids is None else torch.cat([input_ids, context_ids], dim=1)
        *others, last = self.blocks
        compiled = last._compiled_call_impl is not None
        backend = self.config._attn_implementation
        condition, index = self._condition(sigma, layout, batch, length)
        shared = BlockInputs(
            self._rotary(length, layout, cache),
            prepare(backend, layout, tokens, cache, compiled, self.compute_dtype),
            condition,
            *level_runs(index, layout, length),
        )
        alike = previous is None and (condition is None or condition.shape[:2] == (1, 1))
        x, unique = embed(self.vocab_embed, tokens, alike and not compiled)
        if previous is not None:
            assert self.self_conditioning is not None
            x = self.self_conditioning(x, previous, length)
        for block in others:
            x = self._run(block, x, shared, None, None, unique)  # [B, T, H]
            unique = None
        first, seen = (length, length) if layout.streams == 2 else (None, length)
        if context_positions is not None:  # the clean stream goes through the last block, too
            first, seen = None, tokens.shape[1]
        if compiled:  # it needs shapes that do not change with the number of positions
            x = self._run(last, x, shared, first)
        at = flat_places(positions, context_positions, length)  # late: a device may count them
        if not compiled:
            x = self._run(last, x, shared, first, at)
        elif at is not None:
            x = x.flatten(0, 1)[at]
        if condition is not None:
            condition = condition if index is None else condition[:, index[:seen]]
            condition = condition.expand(batch, seen, -1)
            condition = condition if at is None else condition.flatten(0, 1)[at]
        return x, condition

    def expected(self, log_x0: Tensor) -> Tensor:
        """Return expected embeddings [N, H] of clean tokens of log-probabilities [N, V]."""
        table = self.vocab_embed.embedding
        return log_x0.exp().to(table.dtype) @ table

    def _check(self, input_ids: Tensor, context_ids: Tensor | None, layout: Layout) -> None:
        """Refuse a backend that cannot run here, and missing or needless clean tokens."""
        backend = self.config._attn_implementation
        reason = unavailable(backend, input_ids.device, torch.is_grad_enabled())
        if reason:
            raise ValueError(reason)
        if (context_ids is not None) != (layout.streams == 2):
            raise ValueError(f"the {layout.kind} layout takes {layout.streams} stream(s) of tokens")

    def _rotary(self, length: int, layout: Layout, cache: CacheSlice | None) -> Rotary:
        """Return the angles of the positions, which restart in the clean stream."""
        device = self.vocab_embed.embedding.device
        at = torch.arange(length, device=device).repeat(layout.streams)  # [T]
        if cache is not None:
            at = to_device(cache.positions, device)
        return Rotary(at, self.config.head_dim, self.config.rope_theta, self.compute_dtype)

    def _run(self, block: nn.Module, x: Tensor, shared: BlockInputs, *inputs: Any) -> Tensor:
        """Run a block, and run it again in the backward pass if memory is to be saved."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, x, shared, *inputs, use_reentrant=False)
        if shared.attention.cache is not None:
            return block._call_impl(x, shared, *inputs)  # not compiled: shapes differ every call
        return block(x, shared, *inputs)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """Return an empty cache for `slots` rows of `capacity` tokens (a ring for longer ones)."""
        if self.device.type == "cpu":
            self._store_by_input()
        config = self.config
        layers, heads, size = config.num_hidden_layers, config.num_attention_heads, config.head_dim
        shape = layers, 2, slots, heads, capacity, size
        return KVCache(shape, self.compute_dtype, self.device)

    @torch.no_grad()
    def _store_by_input(self) -> None:
        """Store the weights of linear maps input by input; shapes and values stay.

        Products with the few tokens of one block then read them in order: a CPU takes two thirds
        of the time. With many tokens it makes no difference.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear) and module.weight.is_contiguous():
                module.weight.data = module.weight.t().contiguous().t()

    def _condition(
        self, sigma: Tensor | None, layout: Layout, batch: int, length: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return noise-level embeddings [B or 1, S, C], and which each position reads, [T]."""
        if self.sigma_map is None:
            return None, None
        like = self.vocab_embed.embedding
        if not self.config.time_conditioning or sigma is None:
            level = torch.zeros(1, 1, dtype=like.dtype, device=like.device)  # not sharded as `like`
            return functional.silu(self.sigma_map(level)), None
        levels, index = noise_levels(sigma.view(batch, -1), layout, length)
        return functional.silu(self.sigma_map(levels)), index
