"""The denoiser: one pre-norm Transformer for every objective, process and block size.

- Rotary positions on queries and keys; the same code attends fully, causally or in blocks (`layout`).
- Two streams in block layouts: [noisy; clean], positions restarting, the clean one always at sigma = 0.
- The head runs only at `positions`; logits of a whole batch are never materialised in training.
- adaLN (modulation by the noise level) is optional; with `mlp: gelu, norm: layernorm, adaln: true` the
  parameter table is that of the published SEDD, MDLM and BD3-LM checkpoints, name by name.

Shapes: B rows, L positions, T = L or 2L input positions, H hidden, N selected positions, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from .attention import Attention, attend, prepare, unavailable
from .configuration import TextDiffusionConfig
from .layout import FULL, Layout


class TokenEmbedding(nn.Module):
    """The embedding table as a bare parameter, the layout of published checkpoints."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.embedding)


class NoiseEmbedding(nn.Module):
    """Sinusoids of sigma through a small MLP (Sec. 3, arXiv:2212.09748)."""

    frequencies = 128

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.frequencies, size), nn.SiLU(), nn.Linear(size, size)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """[...] noise levels -> [..., C]."""
        steps = torch.arange(self.frequencies, device=sigma.device) / self.frequencies
        angles = sigma.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, eps=1e-5)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class SwiGLU(nn.Module):
    """Gated MLP of 8/3 the width, as many parameters as the 4x one (arXiv:2002.05202)."""

    def __init__(self, size: int):
        super().__init__()
        inner = 64 * -(-8 * size // (3 * 64))
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


def gelu_mlp(size: int) -> nn.Sequential:
    """Linear, tanh-approximated GELU, linear."""
    return nn.Sequential(
        nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
    )


MLPS = {"gelu": gelu_mlp, "swiglu": SwiGLU}


class Rotary:
    """Cosines and sines of one forward pass; applied to queries and keys in half-split form."""

    def __init__(self, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        exponents = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(wide).unsqueeze(-1) * theta ** -exponents.to(wide)
        self.cos = angles.cos().to(dtype)
        self.sin = angles.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Turns [..., T, D]."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first * self.cos - second * self.sin, second * self.cos + first * self.sin], dim=-1
        )


class Modulation:
    """Chunks of one adaLN projection, spread from noise levels to positions."""

    def __init__(self, chunks: Tensor, index: Tensor | None, parts: int):
        chunks = chunks if index is None else chunks[:, index]
        self.parts = chunks.chunk(parts, dim=-1)

    def modulate(self, x: Tensor, part: int) -> Tensor:
        """x * (1 + scale) + shift, parts `part` and `part + 1`."""
        return torch.addcmul(self.parts[part], x, 1.0 + self.parts[part + 1])

    def gate(self, x: Tensor, part: int) -> Tensor:
        """x times a gate."""
        return x * self.parts[part]


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        size = config.hidden_size
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
            self.adaLN_modulation = nn.Linear(config.conditioning_size, 6 * size)
        self.adaln = config.adaln

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attention: Attention,
        condition: Tensor | None,
        index: Tensor | None,
    ) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        if not self.adaln:
            x = x + self._drop(self._attend(self.norm1(x), rotary, attention))
            return x + self._drop(self.mlp(self.norm2(x)))
        m = Modulation(self.adaLN_modulation(condition), index, 6)
        h = self._attend(m.modulate(self.norm1(x), 0), rotary, attention)
        x = x + m.gate(self._drop(h), 2)
        h = self.mlp(m.modulate(self.norm2(x), 3))
        return x + m.gate(self._drop(h), 5)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def _attend(self, x: Tensor, rotary: Rotary, attention: Attention) -> Tensor:
        qkv = self.attn_qkv(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = attend(attention, rotary(q), rotary(k), v)
        return self.attn_out(mixed.transpose(1, 2).flatten(-2))


class OutputLayer(nn.Module):
    """Final norm and the head, which is not tied to the embedding."""

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        self.norm_final = NORMS[config.norm](config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        if config.adaln:
            self.adaLN_modulation = nn.Linear(config.conditioning_size, 2 * config.hidden_size)
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
    _no_split_modules = ["Block"]

    def __init__(self, config: TextDiffusionConfig):
        super().__init__(config)
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.sigma_map = NoiseEmbedding(config.conditioning_size) if config.adaln else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.output_layer = OutputLayer(config)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every branch starts as zero: the network begins as embedding and head."""
        if isinstance(module, TokenEmbedding):
            init.normal_(module.embedding, std=0.02)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LayerNorm | RMSNorm):
            init.ones_(module.weight)
        if isinstance(module, Block):
            last = module.mlp.down if isinstance(module.mlp, SwiGLU) else module.mlp[-1]
            for linear in (module.attn_out, last):
                init.zeros_(linear.weight)
        if isinstance(module, Block | OutputLayer) and module.adaln:
            init.zeros_(module.adaLN_modulation.weight)
        if isinstance(module, OutputLayer):
            init.zeros_(module.linear.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding module (its table is `.embedding`)."""
        return self.vocab_embed

    def get_output_embeddings(self) -> nn.Module:
        """The head's linear map."""
        return self.output_layer.linear

    def forward(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Raw logits.

        Args:
            input_ids: [B, L] noisy tokens.
            context_ids: [B, L] clean tokens, for the `block_diffusion` layout alone.
            sigma: [B] or [B, blocks] total noise; read only with `time_conditioning`.
            layout: who sees whom.
            positions: [N] flat indices into B * L at which logits are wanted; None: everywhere.
            attention_mask: [B, L], 0 at padding; a shorthand for a layout with document ids.

        Returns:
            `.logits`: [N, V], or [B, L, V] when `positions` is None.

        Raises:
            ValueError: the attention backend cannot run here, or a stream is missing.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            layout = layout.within(attention_mask.to(torch.int64) - 1)
        x, condition = self.hidden(input_ids, context_ids, sigma, layout)
        if positions is not None:
            x = x.flatten(0, 1)[positions]
            condition = None if condition is None else condition.flatten(0, 1)[positions]
        return MaskedLMOutput(logits=self.output_layer(x, condition))

    def hidden(
        self,
        input_ids: Tensor,
        context_ids: Tensor | None = None,
        sigma: Tensor | None = None,
        layout: Layout = FULL,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the noisy stream, for the head to read where it is needed.

        Returns:
            [B, L, H] before the final norm, and [B, L, C] conditions of the head (None without adaln).
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
        x = self.vocab_embed(tokens)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(
            x.device.type
        ) else x.dtype
        rotary = Rotary(at, self.config.head_dim, self.config.rope_theta, dtype)
        attention = prepare(backend, layout, tokens.shape[1], tokens.device, batch)
        condition, index = self._condition(sigma, layout, batch, length, x)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, attention, condition, index, use_reentrant=False)
            else:
                x = block(x, rotary, attention, condition, index)
        if condition is not None:
            condition = condition if index is None else condition[:, index[:length]]
            condition = condition.expand(batch, length, -1)
        return x[:, :length], condition

    def _condition(
        self, sigma: Tensor | None, layout: Layout, batch: int, length: int, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Noise-level embeddings [B or 1, S, C], and which of the S each input position reads."""
        if self.sigma_map is None:
            return None, None
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
