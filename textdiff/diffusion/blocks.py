"""Block factorisation: log p(x) = sum_b log p(x^b | x^<b) (Eq. 1, arXiv:2503.09573).

One block is plain diffusion over the whole sequence, blocks of one token are autoregressive.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Blocks:
    """A sequence of `length` positions cut into blocks of `size`; the last may be shorter."""

    length: int
    size: int

    @classmethod
    def of(cls, length: int, block_size: int | None) -> "Blocks":
        """Return the blocks of a config's `block_size`; None: the whole sequence."""
        return cls(length, min(block_size or length, length))

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.size)

    def split(self, x: Tensor, fill: float | bool) -> Tensor:
        """Cut [B, L] into [B, blocks, size]; the missing end of the last block is `fill`."""
        missing = self.count * self.size - self.length
        padded = functional.pad(x, (0, missing), value=fill)
        return torch.unflatten(padded, -1, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Join [B, blocks, size] to [B, L], the inverse of `split`."""
        return x.flatten(-2)[..., : self.length]

    def spread(self, x: Tensor) -> Tensor:
        """Give every position of [B, L] its block's value of [B, blocks]."""
        return self.join(x.unsqueeze(-1).expand(*x.shape, self.size))

    def span(self, index: int) -> slice:
        """Return the positions of one block."""
        return slice(index * self.size, min((index + 1) * self.size, self.length))

    def index(self, device: torch.device | None = None) -> Tensor:
        """Return [L] int64, the block of each position."""
        return torch.arange(self.length, device=device) // self.size
