"""The denoiser: one pre-norm Transformer for every objective, process and block size.

- Rotary positions on queries and keys; one code attends fully, causally or in blocks (`layout`).
- Two streams in block layouts: [noisy; clean], positions restarting, the clean one at sigma = 0.
- The head runs only at `positions`; logits of a whole batch are never materialised in training.
- adaLN (modulation by the noise level) is optional; with `mlp: gelu, norm: layernorm, adaln: true`
  the parameter table is that of the published SEDD, MDLM and BD3-LM checkpoints, name by name.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N selected positions, V vocabulary.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from .attention import Attention, attend, prepare, unavailable
from .cache import CacheSlice, KVCache
from .configuration import TextDiffusionConfig
from .cpu_kernels import applies, dropout_add
from .interface import check_options, cross_entropy, resize
from .layers import (
    NORMS,
    PLAIN,
    LayerNorm,
    Modulation,
    NoiseEmbedding,
    RMSNorm,
    Rotary,
    TokenEmbedding,
    TokenExponents,
    modulation,
)
from .layout import FULL, Layout
from .mlp import MLPS

# Finding the distinct tokens of a call pays from so many tokens on, using them up to this share.
DISTINCT_FROM = 512
DISTINCT_SHARE = 0.25


class Kinds(NamedTuple):
    """Inputs of which many are the same: what is done to each is done once.

    Attributes:
        rows: [1, K, H] those that differ.
        which: [B, T] which of them each position holds.
    """

    rows: Tensor
    which: Tensor


def spread(rows: Tensor, which: Tensor) -> Tensor:
    """Rows [K, ...] at indices [B, T]: [B, T, ...]. (The backward pass of indexing is slower.)"""
    return functional.embedding(which, rows.flatten(1)).unflatten(-1, rows.shape[1:])


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: TextDiffusionConfig, layer: int):
        super().__init__()
        size = config.hidden_size
        self.layer = layer
        self.heads = config.num_attention_heads
        self.dropout = config.dropout
        self.norm1 = NORMS[config.norm](size)
        self.attn_qkv = nn.Linear(size, 3 * size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim)
            self.k_norm = RMSNorm(config.head_dim)
        self.qk_norm = config.qk_norm
        self.attn_out = nn.Linear(size, size, bias=False)
        self.norm2 = NORMS[config.norm](size)
        self.mlp = MLPS[config.mlp](size)
        if config.adaln:
            self.adaLN_modulation = modulation(config.conditioning_size, size, 6, gates=(2, 5))
        self.adaln = config.adaln

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attention: Attention,
        condition: Tensor | None,
        index: Tensor | None,
        first: int | None = None,
        positions: Tensor | None = None,
        kinds: "Kinds | None" = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, T, H].
            rotary: angles of the positions.
            attention: who sees whom.
            condition: embeddings of the noise levels.
            index: which of them each position reads.
            first: how many of the T positions go on; the others are still seen. None: all.
            positions: [N] flat indices into these, if only some of them go on.
            kinds: the rows of x that differ, if many do not.

        Returns:
            [B, T, H], or [B, first, H], or [N, H].
        """
        m = Modulation(self.adaLN_modulation(condition), index, 6) if self.adaln else PLAIN
        distinct, which = (x, None) if kinds is None else kinds
        mixed = self._mix(m.modulate(self.norm1(distinct), 0), rotary, attention, first, which)
        if first is not None:
            x, m = x[:, :first], m.first(first)
        if positions is not None:
            m = m.at(positions, x.shape)
            x, mixed = x.flatten(0, 1)[positions], mixed.flatten(0, 1)[positions]
        x = self._add(x, m.gate(self.attn_out(mixed), 2))
        return self._add(x, m.gate(self.mlp(m.modulate(self.norm2(x), 3)), 5))

    def _add(self, x: Tensor, h: Tensor) -> Tensor:
        return dropout_add(x, h, self.dropout, self.training)

    def _mix(
        self,
        x: Tensor,
        rotary: Rotary,
        attention: Attention,
        first: int | None,
        which: Tensor | None,
    ) -> Tensor:
        """[B, T, H] -> [B, T or first, H]: what attention gathers, heads side by side."""
        if first is None:
            projected = self._project(x, 3)
            q, k, v = rotary(projected if which is None else spread(projected[0], which))
        else:  # of the others nothing is read but keys and values
            asking, seen = x.tensor_split((first,), dim=1)
            q, *own = rotary(self._project(asking, 3), slice(first))
            rest = rotary(self._project(seen, 2), slice(first, None))
            k, v = (torch.cat(pair, dim=2) for pair in zip(own, rest, strict=True))
        return attend(attention, q, k, v, self.layer).transpose(1, 2).flatten(-2)

    def _project(self, x: Tensor, parts: int) -> Tensor:
        """[B, T, H] -> [B, T, parts, heads, D]: queries, keys and values, or the last two."""
        if parts == 3:
            projected = self.attn_qkv(x)
        else:
            projected = functional.linear(x, self.attn_qkv.weight[-parts * x.shape[-1] :])
        projected = projected.unflatten(-1, (parts, self.heads, -1))
        if not self.qk_norm:
            return projected
        *turning, values = projected.unbind(2)
        norms = (self.q_norm, self.k_norm)[-len(turning) :]
        return torch.stack([norm(y) for norm, y in zip(norms, turning, strict=True)] + [values], 2)


class OutputLayer(nn.Module):
    """Final norm and the head, which is not tied to the embedding."""

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        self.norm_final = NORMS[config.norm](config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = modulation(config.conditioning_size, config.hidden_size, 2)
        self.adaln = config.adaln

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """[..., H] (with one condition [..., C] each) -> [..., V] raw logits."""
        x = self.norm_final(x)
        if self.adaln:
            x = Modulation(self.adaLN_modulation(condition), None, 2).modulate(x, 0)
        return self.linear(x)


class TextDiffusionModel(PreTrainedModel):
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
        self.blocks = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.output_layer = OutputLayer(config)
        exponent = config.initial_exponent
        self.exponents = None if exponent is None else TokenExponents(config.vocab_size, exponent)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Unit embeddings, linear maps of variance 1 / (3 inputs); modulation starts as none.

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

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module (its table is `.embedding`)."""
        return self.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        """The head's linear map."""
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
        """Raw logits.

        Args:
            input_ids: [B, L] noisy tokens.
            context_ids: [B, L] clean tokens, for the `block_diffusion` layout alone.
            sigma: [B] or [B, blocks] total noise; read only with `time_conditioning`.
            layout: who sees whom.
            positions: [N] flat indices into B * L at which logits are wanted; None: everywhere.
            attention_mask: [B, L], 0 at padding; a shorthand for a layout with document ids.
            cache: where the tokens before these are found, and these are left; its view fixes
                their positions and takes the layout's place.
            labels: [B, L], or [N] with positions, tokens to predict, -100 where none is: `.loss` is
                their cross-entropy, the average over labels.
            **options: `return_dict`, `num_items_in_batch` (labels to divide the loss by),
                `token_type_ids` (ignored).

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
        x, condition = self.hidden(input_ids, context_ids, sigma, layout, positions, cache)
        logits, loss = self.output_layer(x, condition), None
        if labels is not None:
            loss = cross_entropy(logits, labels, positions, options.get("num_items_in_batch"))
        whole = options.get("return_dict")
        if whole is None:
            whole = self.config.return_dict
        if not whole:
            return (logits,) if loss is None else (loss, logits)
        return MaskedLMOutput(loss=loss, logits=logits)

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
        cache: CacheSlice | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the noisy stream, for the head to read; arguments as for `forward`.

        The last block computes what its attention needs everywhere, and the rest of itself only at
        `positions`.

        Returns:
            [N, H], or [B, L, H], before the final norm, and conditions of the head, or None.
        """
        backend = self.config._attn_implementation
        reason = unavailable(backend, input_ids.device, torch.is_grad_enabled())
        if reason:
            raise ValueError(reason)
        if (context_ids is not None) != (layout.streams == 2):
            raise ValueError(f"the {layout.kind} layout takes {layout.streams} stream(s) of tokens")
        batch, length = input_ids.shape
        tokens = input_ids if context_ids is None else torch.cat([input_ids, context_ids], dim=1)
        at = torch.arange(length, device=tokens.device).repeat(layout.streams)
        if cache is not None:
            at = cache.positions.to(tokens.device)
        rotary = Rotary(at, self.config.head_dim, self.config.rope_theta, self._compute_dtype())
        *others, last = self.blocks
        compiled = last._compiled_call_impl is not None
        device = tokens.device
        attention = prepare(backend, layout, tokens.shape[1], device, batch, cache, compiled)
        condition, index = self._condition(sigma, layout, batch, length)
        noisy = length if layout.streams == 2 else None
        x, kinds = self._embed(tokens, alike=condition is None or condition.shape[:2] == (1, 1))
        for block in others:
            x = self._run(block, x, rotary, attention, condition, index, None, None, kinds)
            kinds = None
        if not compiled:
            x = self._run(last, x, rotary, attention, condition, index, noisy, positions)
        else:  # a compiled block wants shapes that do not change with the number of positions
            x = self._run(last, x, rotary, attention, condition, index, noisy)
            x = x if positions is None else x.flatten(0, 1)[positions]
        if condition is not None:
            condition = condition if index is None else condition[:, index[:length]]
            condition = condition.expand(batch, length, -1)
            condition = condition if positions is None else condition.flatten(0, 1)[positions]
        return x, condition

    def _embed(self, tokens: Tensor, alike: bool) -> tuple[Tensor, Kinds | None]:
        """[B, T, H] embeddings; and, on a CPU, the distinct ones for the first block to project.

        Masks are alike, and so is a token in both streams; characters are few anyway, and a step of
        a byte model takes some 2 % less time. `alike`: noise levels do not tell equal tokens apart.
        """
        compiled = self.blocks[0]._compiled_call_impl is not None
        if not alike or compiled or tokens.numel() < DISTINCT_FROM or not applies(tokens):
            return self.vocab_embed(tokens), None
        ids, which = torch.unique(tokens, return_inverse=True)
        if len(ids) > DISTINCT_SHARE * tokens.numel():
            return self.vocab_embed(tokens), None
        rows = self.vocab_embed(ids)
        return spread(rows, which), Kinds(rows.unsqueeze(0), which)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """A block, which is computed again in the backward pass if memory is to be saved."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        if any(isinstance(x, Attention) and x.cache is not None for x in inputs):
            return block._call_impl(*inputs)  # never compiled: each call has a shape of its own
        return block(*inputs)

    def new_cache(self, slots: int, capacity: int) -> KVCache:
        """An empty cache for `slots` rows of up to `capacity` tokens (a ring, if they are more)."""
        config = self.config
        if self.device.type == "cpu":
            self._store_by_input()
        return KVCache(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.head_dim,
            slots,
            capacity,
            self._compute_dtype(),
            self.device,
        )

    @torch.no_grad()
    def _store_by_input(self) -> None:
        """Stores the weights of linear maps input by input; shapes and values stay.

        Products with the few tokens of one block then read them in order: a CPU takes two thirds
        of the time. With many tokens it makes no difference.
        """
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear) and module.weight.is_contiguous():
                module.weight.data = module.weight.t().contiguous().t()

    def _compute_dtype(self) -> torch.dtype:
        """Of queries, keys and values: that of autocast, or of the weights."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.vocab_embed.embedding.dtype

    def _condition(
        self, sigma: Tensor | None, layout: Layout, batch: int, length: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Noise-level embeddings [B or 1, S, C], and which of the S each input position reads."""
        if self.sigma_map is None:
            return None, None
        like = self.vocab_embed.embedding
        if not self.config.time_conditioning or sigma is None:
            return functional.silu(self.sigma_map(like.new_zeros(1, 1))), None
        levels = sigma.view(batch, -1)
        if layout.streams == 1 and levels.shape[1] == 1:
            return functional.silu(self.sigma_map(levels)), None
        size = layout.block_size or length
        index = torch.arange(length, device=like.device) // size
        levels = levels.expand(batch, -(-length // size))
        if layout.streams == 2:  # the clean stream sees sigma = 0, or a cache would not be exact
            index = torch.cat([index, torch.full_like(index, levels.shape[1])])
            levels = torch.cat([levels, levels.new_zeros(batch, 1)], dim=1)
        return functional.silu(self.sigma_map(levels)), index
