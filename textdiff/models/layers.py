"""Layers of the denoiser: embeddings, norms, rotary positions, modulation, self-conditioning.

Shapes: B rows, L tokens, T positions (L or 2L), H hidden, C condition, D channels per head, N
positions with an earlier prediction.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration import TextDiffusionConfig
from .cpu_kernels import rotate


class TokenEmbedding(nn.Module):
    """Embedding table as a bare parameter, the layout of published checkpoints."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Map [...] ids to [..., H]."""
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
        """Map [...] noise levels to [..., C]."""
        dtype = self.mlp[0].weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(self.frequencies, device=sigma.device, dtype=wide) / self.frequencies
        angles = sigma.to(wide).unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class StepEmbedding(nn.Embedding):
    """Learned table of the steps of discrete time."""

    def forward(self, step: Tensor) -> Tensor:
        """Map [...] indices of steps, also as real numbers, to [..., C]."""
        return super().forward(step.round().long().clamp(0, self.num_embeddings - 1))


class TokenExponents(nn.Module):
    """Learned schedule's exponent of every token, w = softplus(raw) > 0 (arXiv:2406.04329).

    The network does not read it; it lives here because a schedule is averaged, saved and loaded
    with the weights that were trained under it.
    """

    def __init__(self, vocab_size: int, initial: float):
        super().__init__()
        self.start = initial + math.log(-math.expm1(-initial))  # softplus(start) = initial
        self.raw = nn.Parameter(torch.full((vocab_size,), self.start))

    def forward(self) -> Tensor:
        """Return [V] float64."""
        return functional.softplus(self.raw.double())


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, eps=1e-5)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., H] to [..., H]."""
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def modulation(inputs: int, size: int, count: int, gates: tuple[int, ...] = ()) -> nn.Linear:
    """Return the linear map to `count` modulations of `size` channels.

    It is marked so that it is initialised to change nothing: scales and shifts zero, gates one.
    """
    linear = nn.Linear(inputs, count * size)
    linear.gates = [slice(gate * size, (gate + 1) * size) for gate in gates]
    return linear


class Rotary:
    """Cosines and sines of one forward pass, applied to queries and keys.

    Args:
        positions: [T], or [B, T] where rows differ, which has no backward pass.
        head_dim: D.
        theta: base of the frequencies.
        dtype: of queries and keys.
    """

    def __init__(self, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
        angles = positions.to(wide).unsqueeze(-1) * theta**-exponents  # [..., T, D / 2]
        if positions.ndim == 2:
            angles = angles.unsqueeze(1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def __call__(self, projected: Tensor, at: slice = slice(None)) -> tuple[Tensor, ...]:
        """Turn queries and keys (or keys alone); values stay.

        Args:
            projected: [B, T, P, heads, D].
            at: which of the positions these are.

        Returns:
            P tensors [B, heads, T, D].
        """
        return rotate(projected, self.cos[..., at, :], self.sin[..., at, :])


class Modulation:
    """Chunks of one adaLN projection, spread from noise levels to positions.

    Args:
        chunks: [B or 1, S, count H] of the S noise levels; None: nothing is modulated.
        index: [R] which level each run of positions reads; None: there is one for all.
        count: number of chunks.
        run: consecutive positions that read one level.
    """

    def __init__(self, chunks: Tensor | None, index: Tensor | None, count: int, run: int = 1):
        if chunks is not None and index is not None:
            chunks = chunks[:, index]  # [B or 1, R, count H]
        self.chunks = () if chunks is None else chunks.chunk(count, dim=-1)
        self.run = run

    def first(self, length: int) -> "Modulation":
        """Return the modulations of the first positions alone."""
        runs = -(-length // self.run)
        return self._with((chunk[:, :runs] for chunk in self.chunks), self.run)

    def at(self, positions: Tensor, shape: torch.Size) -> "Modulation":
        """Return those of flat positions [N] into the first two dimensions of [B, T, H]."""
        runs = (shape[0], shape[1] // self.run, shape[2])
        if self.run > 1:
            positions = positions // self.run
        return self._with((chunk.expand(runs).flatten(0, 1)[positions] for chunk in self.chunks), 1)

    def _with(self, chunks: Iterable[Tensor], run: int) -> "Modulation":
        chosen = Modulation(None, None, 0)  # not a copy, at which older compilers break a graph
        chosen.chunks, chosen.run = tuple(chunks), run
        return chosen

    def _by_run(self, x: Tensor) -> Tensor:
        """Return [B, T, H] as [B, R, run, H], to which [B, R, 1, H] is broadcast."""
        return x.unflatten(1, (-1, self.run))

    def modulate(self, x: Tensor, at: int) -> Tensor:
        """Return x * (1 + scale) + shift, with shift and scale from chunk `at` on."""
        if not self.chunks:
            return x
        shift, scale = self.chunks[at], 1.0 + self.chunks[at + 1]
        if self.run == 1:
            return torch.addcmul(shift, x, scale)
        shift, scale = shift.unsqueeze(2), scale.unsqueeze(2)  # [B or 1, R, 1, H]
        return torch.addcmul(shift, self._by_run(x), scale).flatten(1, 2)

    def gate(self, x: Tensor, at: int) -> Tensor:
        """Return x times the gate in chunk `at`."""
        if not self.chunks:
            return x
        if self.run == 1:
            return x * self.chunks[at]
        return (self._by_run(x) * self.chunks[at].unsqueeze(2)).flatten(1, 2)


class Previous(NamedTuple):
    """Earlier predictions of some positions.

    Attributes:
        at: [N] flat indices into B * L noisy tokens, all different.
        expected: [N, H] expected embeddings of the clean tokens, from `Denoiser.expected`.
        known: [N] bool, which of them are read; None: all.
    """

    at: Tensor
    expected: Tensor
    known: Tensor | None = None


class SelfConditioning(nn.Module):
    """Map of expected embeddings to what is added to those of noisy tokens: MLP(norm(p_0 E)).

    p_0 is an earlier prediction of the same tokens, E the embeddings (arXiv:2208.04202; under masks
    arXiv:2604.26985 and arXiv:2510.19304). The last layer starts at zero: a network begins as it is
    without this input. Finished tokens have no prediction, so that a cache of their keys and values
    stays exact.
    """

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = NORMS[config.norm](size)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.mlp[-1].gates = ()  # marked so that it is initialised to zero

    def forward(self, x: Tensor, previous: Previous, length: int) -> Tensor:
        """Add to embeddings.

        Args:
            x: [B, T, H], the noisy stream first.
            previous: earlier predictions of noisy tokens.
            length: L.

        Returns:
            [B, T, H].
        """
        added = self.mlp(self.norm(previous.expected)).to(x.dtype)  # [N, H]
        if previous.known is not None:
            added = added.where(previous.known[:, None], 0.0)
        at = previous.at + previous.at // length * (x.shape[1] - length)
        return x.flatten(0, 1).index_add(0, at, added).view_as(x)
