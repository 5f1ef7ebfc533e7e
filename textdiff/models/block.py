"""The Transformer block: MLPs, attention between projections, and the output layer.

| `mlp` | equation |
|---|---|
| `gelu` | W2 gelu(W1 x + b1) + b2 |
| `swiglu` | W2 (silu(G x) * U x) |

Shapes: B rows, T positions of all streams, H hidden, N selected positions, U unique rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Attention, attend
from .configuration import TextDiffusionConfig
from .cpu_kernels import applies, dropout_add
from .cpu_mlp import gelu_mlp, in_pieces, swiglu_mlp, trains_on_cpu
from .layers import NORMS, Modulation, RMSNorm, Rotary, modulation

# Projecting distinct tokens once is faster for calls of at least so many tokens, of which at most
# this share differs: a step of a byte model takes 2 % less time, one of two streams 3 to 5 %.
UNIQUE_FROM = 512
UNIQUE_SHARE = 0.25


def plain(*layers: nn.Module) -> bool:
    """Return whether linear maps are their weights alone, without adapters around them."""
    return all(type(layer) is nn.Linear for layer in layers)


class GeluMLP(nn.Sequential):
    """Linear, tanh-approximated GELU (arXiv:1606.08415), linear."""

    def __init__(self, size: int):
        super().__init__(
            nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        first, _, last = self
        if not (trains_on_cpu(x) and plain(first, last)):
            return in_pieces(super().forward, x)
        return gelu_mlp(x, first.weight, first.bias, last.weight, last.bias)


class SwiGLU(nn.Module):
    """Gated MLP of 8/3 the width, as many parameters as the 4x one (arXiv:2002.05202)."""

    def __init__(self, size: int):
        super().__init__()
        inner = 64 * -(-8 * size // (3 * 64))
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        if not (trains_on_cpu(x) and plain(self.gate_up, self.down)):
            return in_pieces(self._plain, x)
        return swiglu_mlp(x, self.gate_up.weight, self.down.weight)

    def _plain(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


MLPS: dict[str, Callable[[int], nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU}


class BlockInputs(NamedTuple):
    """Inputs that all blocks of one forward pass share.

    Attributes:
        rotary: angles of the positions.
        attention: the prepared attention mask.
        condition: [B or 1, S, C] embeddings of the noise levels, or None.
        index: [R] which of the S levels each run of positions reads, or None.
        run: consecutive positions that read one level.
    """

    rotary: Rotary
    attention: Attention
    condition: Tensor | None
    index: Tensor | None
    run: int = 1


class UniqueRows(NamedTuple):
    """Inputs with many equal rows, so that each distinct one is projected once.

    Attributes:
        rows: [1, U, H] distinct rows.
        which: [B, T] index of each position's row.
    """

    rows: Tensor
    which: Tensor


def spread(rows: Tensor, which: Tensor) -> Tensor:
    """Return rows [U, ...] at indices [B, T]: [B, T, ...].

    The backward pass of plain indexing is slower.
    """
    return functional.embedding(which, rows.flatten(1)).unflatten(-1, rows.shape[1:])


def embed(embedding: nn.Module, tokens: Tensor, alike: bool) -> tuple[Tensor, UniqueRows | None]:
    """Return [B, T, H] embeddings; and, on a CPU, the unique ones for the first block.

    Masks are equal, and so is a token in both streams; there are few characters anyway.

    Args:
        embedding: maps [...] ids to [..., H].
        tokens: [B, T].
        alike: whether equal tokens are to be processed alike: they have equal noise levels, and
            the blocks are not compiled.
    """
    if not alike or tokens.numel() < UNIQUE_FROM or not applies(tokens):
        return embedding(tokens), None
    ids, which = torch.unique(tokens, return_inverse=True)
    if len(ids) > UNIQUE_SHARE * tokens.numel():
        return embedding(tokens), None
    rows = embedding(ids)  # [U, H]
    return spread(rows, which), UniqueRows(rows.unsqueeze(0), which)


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
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim)
            self.k_norm = RMSNorm(config.head_dim)
        self.attn_out = nn.Linear(size, size, bias=False)
        self.norm2 = NORMS[config.norm](size)
        self.mlp = MLPS[config.mlp](size)
        self.adaln = config.adaln
        if config.adaln:
            self.adaLN_modulation = modulation(config.conditioning_size, size, 6, gates=(2, 5))

    def forward(
        self,
        x: Tensor,
        shared: BlockInputs,
        first: int | None = None,
        positions: Tensor | None = None,
        unique: UniqueRows | None = None,
    ) -> Tensor:
        """Run one block.

        Args:
            x: [B, T, H].
            shared: inputs of all blocks.
            first: number of positions that go on; the others only give keys and values. None: all.
            positions: [N] flat indices into these, if only some of them go on.
            unique: the distinct rows of x, if many are equal.

        Returns:
            [B, T, H], or [B, first, H], or [N, H].
        """
        chunks = self.adaLN_modulation(shared.condition) if self.adaln else None
        m = Modulation(chunks, shared.index, 6, shared.run)
        rows, which = (x, None) if unique is None else unique
        mixed = self._mix(m.modulate(self.norm1(rows), 0), shared, first, which)
        if first is not None:
            x, m = x[:, :first], m.first(first)
        if positions is not None:
            m = m.at(positions, x.shape)
            x, mixed = x.flatten(0, 1)[positions], mixed.flatten(0, 1)[positions]  # [N, H]
        x = dropout_add(x, m.gate(self.attn_out(mixed), 2), self.dropout, self.training)
        h = self.mlp(m.modulate(self.norm2(x), 3))
        return dropout_add(x, m.gate(h, 5), self.dropout, self.training)

    def _mix(
        self, x: Tensor, shared: BlockInputs, first: int | None, which: Tensor | None
    ) -> Tensor:
        """Attend: [B, T, H] -> [B, T or first, H], heads side by side."""
        rotary = shared.rotary
        if first is None:
            projected = self._project(x, 3)
            q, k, v = rotary(projected if which is None else spread(projected[0], which))
        else:  # positions from `first` on need no queries
            asking, seen = x.tensor_split((first,), dim=1)
            q, *own = rotary(self._project(asking, 3), slice(first))
            rest = rotary(self._project(seen, 2), slice(first, None))
            k, v = (torch.cat(pair, dim=2) for pair in zip(own, rest, strict=True))
        return attend(shared.attention, q, k, v, self.layer).transpose(1, 2).flatten(-2)

    def _project(self, x: Tensor, count: int) -> Tensor:
        """Project [B, T, H] to [B, T, count, heads, D]: queries, keys, values, or the last two."""
        if count == 3:
            projected = self.attn_qkv(x)
        elif not plain(self.attn_qkv):
            projected = self.attn_qkv(x)[..., -count * x.shape[-1] :]
        else:
            projected = functional.linear(x, self.attn_qkv.weight[-count * x.shape[-1] :])
        projected = projected.unflatten(-1, (count, self.heads, -1))
        if not self.qk_norm:
            return projected
        *turning, values = projected.unbind(2)
        norms = (self.q_norm, self.k_norm)[-len(turning) :]
        # Autocast of CUDA normalises in float32, which attention would then be computed in.
        normed = [norm(y).to(y.dtype) for norm, y in zip(norms, turning, strict=True)]
        return torch.stack([*normed, values], 2)


class OutputLayer(nn.Module):
    """Final norm and the head, which is not tied to the embedding."""

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        self.norm_final = NORMS[config.norm](config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.vocab_size)
        self.adaln = config.adaln
        if config.adaln:
            self.adaLN_modulation = modulation(config.conditioning_size, config.hidden_size, 2)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [..., H], with one condition [..., C] each, to [..., V] raw logits."""
        chunks = self.adaLN_modulation(condition) if self.adaln else None
        return self.linear(Modulation(chunks, None, 2).modulate(self.norm_final(x), 0))
