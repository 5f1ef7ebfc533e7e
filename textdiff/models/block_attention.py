"""Attention over [noisy; clean] without the empty three quarters of its 2L x 2L square.

A chunk of positions needs, for the queries of both streams, the clean tokens before it and the
2c x 2c square of its own noisy and clean tokens, most of which is allowed. So every chunk is one
plain product with [clean prefix, noisy chunk, clean chunk], and only the square has a mask. Scores
are made again in the backward pass; none outlive their chunk.

Shapes: B rows, H heads, L positions per stream, D channels, c positions per chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import Layout

# Positions per chunk, unless a block is longer: less work is wasted in smaller chunks, but products
# are slower.
CHUNK = 64
# Scores alive at once, per thread: they are read several times and should stay near the core.
SCORES = 2**19


@dataclass(frozen=True)
class Chunks:
    """How a two-stream input is cut, and who sees whom within a chunk.

    Attributes:
        length: L.
        size: c, a multiple of the block size.
        square: [2c, 2c] bool, what the tokens [noisy; clean] of a chunk see of each other.
        document_ids: [B, L], or None where every row is one document.
    """

    length: int
    size: int
    square: Tensor
    document_ids: Tensor | None

    @classmethod
    def of(cls, layout: Layout, length: int, device: torch.device) -> "Chunks":
        """The chunks of a block-diffusion layout."""
        assert layout.block_size is not None
        size = min(layout.block_size * max(1, CHUNK // layout.block_size), length)
        square = Layout(layout.kind, layout.block_size).mask(2 * size, device)
        assert square is not None
        return cls(length, size, square, layout.document_ids)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """(noisy, clean) positions of each chunk in a two-stream input; the last may be shorter."""
        for start in range(0, self.length, self.size):
            end = min(start + self.size, self.length)
            yield slice(start, end), slice(self.length + start, self.length + end)

    def bias(self, noisy: slice, rows: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a chunk's last keys, 0 or -inf.

        Args:
            noisy: the chunk.
            rows: [P] int64, the row of every piece.
            queries: 1 if the noisy stream alone asks, 2 with the clean one.
            dtype: of the scores.

        Returns:
            [queries c, 2c] for the square alone, or [P, queries c, keys] with documents.
        """
        size, start = noisy.stop - noisy.start, noisy.start
        both = torch.cat([torch.arange(size), self.size + torch.arange(size)])
        allowed = self.square[both[: queries * size, None], both[None, :]]
        if self.document_ids is not None:
            own = self.document_ids[:, noisy].repeat(1, 2)
            keys = torch.cat([self.document_ids[:, :start], own], dim=1)
            same = (own[:, : queries * size, None] == keys[:, None, :]) & (keys >= 0)[:, None, :]
            same[:, :, start:] &= allowed
            same[:, :, start:] |= torch.eye(2 * size, dtype=torch.bool)[: queries * size]
            allowed = same[rows]
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


@torch.compiler.disable
def block_attention(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks) -> Tensor:
    """Attention of a block-diffusion layout on a CPU, chunk by chunk.

    Args:
        q: [B, H, 2L, D], or [B, H, L, D] for the noisy stream alone.
        k: [B, H, 2L, D].
        v: [B, H, 2L, D].
        chunks: how the streams are cut.

    Returns:
        As `q`.
    """
    return _BlockAttention.apply(q, k, v, chunks)


class _BlockAttention(torch.autograd.Function):
    """Every chunk is softmax(q k^T / sqrt(D) + bias) v over the keys it may see."""

    @staticmethod
    def forward(ctx, q, k, v, chunks):
        ctx.save_for_backward(q, k, v)
        ctx.chunks = chunks
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        scale = 1 / math.sqrt(q.shape[-1])
        for piece, biases in _pieces(q, chunks):
            a, b, c, o = (x.flatten(0, 1)[piece] for x in (q, k, v, out))
            a = a * scale
            for (noisy, clean), bias in zip(chunks, biases, strict=True):
                p = _probabilities(_asking(a, noisy, clean), _seen(b, noisy, clean), bias)
                _put(o, torch.bmm(p, _seen(c, noisy, clean)), noisy, clean)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        chunks, scale = ctx.chunks, 1 / math.sqrt(q.shape[-1])
        contiguous = torch.contiguous_format
        grads = [torch.empty_like(x, memory_format=contiguous) for x in (q, k, v)]
        for piece, biases in _pieces(q, chunks):
            a, b, c, g = (x.flatten(0, 1)[piece] for x in (q, k, v, grad))
            to_q, to_k, to_v = (x.flatten(0, 1)[piece] for x in grads)
            a = a * scale
            for (noisy, clean), bias in zip(chunks, biases, strict=True):
                asks, slope = _asking(a, noisy, clean), _asking(g, noisy, clean)
                keys, values = _seen(b, noisy, clean), _seen(c, noisy, clean)
                p = _probabilities(asks, keys, bias)
                slopes = torch._softmax_backward_data(torch.bmm(slope, values.mT), p, -1, p.dtype)
                _put(to_q, torch.bmm(slopes, keys).mul_(scale), noisy, clean)
                _add(to_k, torch.bmm(slopes.mT, asks), noisy, clean)
                _add(to_v, torch.bmm(p.mT, slope), noisy, clean)
        return *grads, None


def _pieces(q: Tensor, chunks: Chunks) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows x heads whose scores in one chunk are about `SCORES`, and their biases."""
    rows, heads, queries, _ = q.shape
    largest = 2 * chunks.size * (chunks.length + chunks.size)
    room = max(1, SCORES * torch.get_num_threads() // largest)
    of = torch.arange(rows).repeat_interleave(heads)
    biases: list[Tensor] = []
    for start in range(0, rows * heads, room):
        piece = slice(start, start + room)
        if chunks.document_ids is not None or not biases:
            streams = queries // chunks.length
            biases = [chunks.bias(noisy, of[piece], streams, q.dtype) for noisy, _ in chunks]
        yield piece, biases


def _asking(x: Tensor, noisy: slice, clean: slice) -> Tensor:
    """[P, T, D] -> the queries of a chunk: its noisy and, if they are there, its clean ones."""
    return x[:, noisy] if x.shape[1] < clean.stop else torch.cat([x[:, noisy], x[:, clean]], 1)


def _seen(x: Tensor, noisy: slice, clean: slice) -> Tensor:
    """[P, 2L, D] -> what a chunk sees: the clean prefix, then its own noisy and clean tokens."""
    length = clean.start - noisy.start
    return torch.cat([x[:, length : clean.start], x[:, noisy], x[:, clean]], 1)


def _probabilities(asks: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """[P, queries, keys] softmax of the scores of one chunk, whose last keys have a bias."""
    p = torch.bmm(asks, keys.mT)
    p[..., -bias.shape[-1] :] += bias
    return torch.softmax(p, -1, out=p)


def _put(out: Tensor, part: Tensor, noisy: slice, clean: slice) -> None:
    """Writes what belongs to a chunk's queries to [P, T, D]."""
    size = noisy.stop - noisy.start
    out[:, noisy] = part[:, :size]
    if part.shape[1] > size:
        out[:, clean] = part[:, size:]


def _add(whole: Tensor, part: Tensor, noisy: slice, clean: slice) -> None:
    """Adds gradients of what a chunk sees to those of the input, [P, 2L, D].

    In the order of the chunks its own tokens have had none before.
    """
    length, start, size = clean.start - noisy.start, noisy.start, noisy.stop - noisy.start
    whole[:, length : length + start] += part[:, :start]
    whole[:, noisy] = part[:, start : start + size]
    whole[:, clean] = part[:, start + size :]
