"""What the denoiser is built from: embeddings, norms, MLPs, rotary positions, modulation."""

import math
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cpu_kernels import rotate


class TokenEmbedding(nn.Module):
    """The embedding table as a bare parameter, the layout of published checkpoints."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., H]."""
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
        dtype = self.mlp[0].weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(self.frequencies, device=sigma.device, dtype=wide) / self.frequencies
        angles = sigma.to(wide).unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class TokenExponents(nn.Module):
    """The learned schedule's exponent of every token, w = softplus(raw) > 0 (arXiv:2406.04329).

    No part of the network's function; it lives here because a schedule is averaged, saved and
    loaded with the weights that were trained under it.
    """

    def __init__(self, vocab_size: int, initial: float):
        super().__init__()
        self.start = initial + math.log(-math.expm1(-initial))  # softplus(start) = initial
        self.raw = nn.Parameter(torch.full((vocab_size,), self.start))

    def forward(self) -> Tensor:
        """[V] float64."""
        return functional.softplus(self.raw.double())


class LayerNorm(nn.Module):
    """Layer norm with a weight and no bias."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return functional.layer_norm(x, self.weight.shape, self.weight, eps=1e-5)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def modulation(inputs: int, size: int, parts: int, gates: tuple[int, ...] = ()) -> nn.Linear:
    """The linear map to `parts` modulations of `size` channels.

    It is marked so that it is initialised to change nothing: scales and shifts zero, gates one.
    """
    linear = nn.Linear(inputs, parts * size)
    linear.gates = [slice(part * size, (part + 1) * size) for part in gates]
    return linear


class Rotary:
    """Cosines and sines of one forward pass, applied to queries and keys.

    Args:
        positions: [T], or [B, T] where rows differ, which has no backward pass.
        head_dim: D.
        theta: base of the frequencies.
        dtype: of what is turned.
    """

    def __init__(self, positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=wide) / head_dim
        angles = positions.to(wide).unsqueeze(-1) * theta**-exponents
        if positions.ndim == 2:
            angles = angles.unsqueeze(1)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.cos, self.sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def __call__(self, projected: Tensor, part: slice = slice(None)) -> tuple[Tensor, ...]:
        """Turns queries and keys (or keys alone); values stay.

        Args:
            projected: [B, T, P, heads, D].
            part: which of the positions these are.

        Returns:
            P tensors [B, heads, T, D].
        """
        return rotate(projected, self.cos[..., part, :], self.sin[..., part, :])


class Modulation:
    """Chunks of one adaLN projection, spread from noise levels to positions."""

    def __init__(self, chunks: Tensor, index: Tensor | None, parts: int):
        chunks = chunks if index is None else chunks[:, index]
        self.parts = chunks.chunk(parts, dim=-1)

    def first(self, length: int) -> "Modulation":
        """The modulations of the first positions alone."""
        return self._with([part[:, :length] for part in self.parts])

    def at(self, positions: Tensor, shape: torch.Size) -> "Modulation":
        """Those of flat positions [N] into the first two dimensions of a shape [B, T, H]."""
        return self._with([part.expand(shape).flatten(0, 1)[positions] for part in self.parts])

    def _with(self, parts: list[Tensor]) -> "Modulation":
        chosen = copy(self)
        chosen.parts = tuple(parts)
        return chosen

    def modulate(self, x: Tensor, part: int) -> Tensor:
        """x * (1 + scale) + shift, parts `part` and `part + 1`."""
        return torch.addcmul(self.parts[part], x, 1.0 + self.parts[part + 1])

    def gate(self, x: Tensor, part: int) -> Tensor:
        """x times a gate."""
        return x * self.parts[part]


class _Plain(Modulation):
    """No modulation."""

    def __init__(self) -> None:
        self.parts = ()

    def first(self, length: int) -> Modulation:
        return self

    def at(self, positions: Tensor, shape: torch.Size) -> Modulation:
        return self

    def modulate(self, x: Tensor, part: int) -> Tensor:
        return x

    def gate(self, x: Tensor, part: int) -> Tensor:
        return x


PLAIN = _Plain()
