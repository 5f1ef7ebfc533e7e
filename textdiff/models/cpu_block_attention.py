"""Attention over [noisy; clean] without the empty three quarters of its 2L x 2L square.

A chunk of positions needs, for the queries of both streams, the clean tokens before it. It also
needs the 2c x 2c square of its own clean and noisy tokens, most of which is allowed. So every chunk
is one plain product with [clean prefix, clean chunk, noisy chunk], and only the square has a mask.
From the last chunk to the first these keys are the beginning of one buffer: the clean stream, whose
end is no longer needed and is overwritten by each chunk's noisy tokens. Probabilities are kept for
the backward pass where they are not larger than queries, keys and values. Longer sequences compute
them again, so that memory stays linear in the length.

Shapes: B rows, H heads, L positions per stream, D channels, c positions per chunk, P rows and heads
together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_kernels import head_spans
from .layout import Layout

# Positions per chunk times bytes of a number, unless a block is longer: less work is wasted in
# smaller chunks, but products are slower, the more so in half precision.
CHUNK = 128
# Bytes of scores alive at once, per thread: they are read several times and should stay near the
# core.
SCORES = 2**21


@dataclass(frozen=True)
class Chunks:
    """Chunks of a two-stream input, with the mask inside a chunk.

    Attributes:
        length: L.
        size: c, a multiple of the block size.
        square: [2c, 2c] bool: which of [clean; noisy] the tokens [noisy; clean] of a chunk see.
        document_ids: [B, L], or None where every row is one document.
    """

    length: int
    size: int
    square: Tensor
    document_ids: Tensor | None

    @classmethod
    def of(cls, layout: Layout, length: int, dtype: torch.dtype) -> "Chunks":
        """Return the chunks of a block-diffusion layout."""
        assert layout.block_size is not None
        room = CHUNK // dtype.itemsize
        size = min(layout.block_size * max(1, room // layout.block_size), length)
        square = layout.within(None).mask(2 * size, torch.device("cpu"))
        assert square is not None
        return cls(length, size, square.roll(size, dims=1), layout.document_ids)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yield (noisy, clean) positions of each chunk, from the last to the first.

        The last one may be shorter than the others.
        """
        for start in reversed(range(0, self.length, self.size)):
            end = min(start + self.size, self.length)
            yield slice(start, end), slice(self.length + start, self.length + end)

    def scores(self, streams: int) -> int:
        """Count the pairs of queries and keys whose scores are computed, per row and head."""
        widths = [(noisy.start, noisy.stop - noisy.start) for noisy, _ in self]
        return sum(streams * size * (start + 2 * size) for start, size in widths)

    def kept(self, streams: int, channels: int) -> int:
        """Count the probabilities kept for the backward pass, per row and head: all or none.

        Args:
            streams: 1 if only the noisy stream has queries, 2 with the clean one.
            channels: D.
        """
        scores = self.scores(streams)
        return scores if scores <= (streams + 4) * self.length * channels else 0

    def bias(self, noisy: slice, rows: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
        """Return the bias of the scores of a chunk's last keys, 0 or -inf.

        Args:
            noisy: the chunk.
            rows: [P] int64, the row of each row and head.
            queries: 1 if only the noisy stream has queries, 2 with the clean one.
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
            itself = torch.eye(2 * size, dtype=torch.bool).roll(size, dims=1)
            same[:, :, start:] |= itself[: queries * size]
            allowed = same[rows]
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


@torch.compiler.disable
def block_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend in a block-diffusion layout on a CPU, chunk by chunk.

    Args:
        q: [B, H, 2L, D], or [B, H, L, D] for the noisy stream alone.
        k: [B, H, 2L, D].
        v: [B, H, 2L, D].
        layout: of kind `block_diffusion`.

    Returns:
        As `q`.
    """
    return _BlockAttention.apply(q, k, v, Chunks.of(layout, k.shape[2] // 2, q.dtype))


class _BlockAttention(torch.autograd.Function):
    """Attention of every chunk: softmax(q k^T / sqrt(D) + bias) v over the keys it may see."""

    @staticmethod
    def forward(ctx, q, k, v, chunks):
        ctx.chunks = chunks
        rows, heads, queries, size = q.shape
        keeps = any(ctx.needs_input_grad) and chunks.kept(queries // chunks.length, size) > 0
        kept = []
        out = q.new_empty(rows, queries, heads, size).transpose(1, 2)  # heads end up side by side
        for at, biases in _pieces(q, chunks):
            a, b, c = (x[at].flatten(0, 1) for x in (q, k, v))  # [P, T, D]
            keys, values = _Seen(b, chunks), _Seen(c, chunks)
            for (noisy, clean), bias in zip(chunks, biases, strict=True):
                p = _probabilities(_queries(a, noisy, clean), keys.at(noisy), bias)
                _put(out[at], torch.bmm(p, values.at(noisy)), noisy, clean)
                if keeps:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        kept = iter(saved)
        chunks, scale = ctx.chunks, 1 / math.sqrt(q.shape[-1])
        contiguous = torch.contiguous_format
        grads = [torch.empty_like(x, memory_format=contiguous) for x in (q, k, v)]
        for at, biases in _pieces(q, chunks):
            a, b, c = (x[at].flatten(0, 1) for x in (q, k, v))  # [P, T, D]
            to_k, to_v = (x[at].flatten(0, 1) for x in grads[1:])
            held_keys, held_values = _Seen(b, chunks), _Seen(c, chunks)
            for (noisy, clean), bias in zip(chunks, biases, strict=True):
                queries = _queries(a, noisy, clean)
                slope = _queries(grad[at], noisy, clean).flatten(0, 1)
                keys, values = held_keys.at(noisy), held_values.at(noisy)
                p = next(kept) if saved else _probabilities(queries, keys, bias)
                slopes = torch._softmax_backward_data(torch.bmm(slope, values.mT), p, -1, p.dtype)
                _put(grads[0][at], _scaled(slopes, keys, scale), noisy, clean)
                _add(to_k, _scaled(slopes.mT, queries, scale), noisy, clean)
                _add(to_v, torch.bmm(p.mT, slope), noisy, clean)
        return *grads, None


class _Seen:
    """Keys or values [P, 2L, D] that the chunks see, read from the last chunk to the first."""

    def __init__(self, x: Tensor, chunks: Chunks):
        self.x = x
        self.buffer = x.new_empty(len(x), chunks.length + chunks.size, x.shape[-1])
        self.buffer[:, : chunks.length] = x[:, chunks.length :]

    def at(self, noisy: slice) -> Tensor:
        """Return [P, end + c, D]: clean tokens up to the chunk's end, then its noisy ones."""
        end = 2 * noisy.stop - noisy.start
        self.buffer[:, noisy.stop : end] = self.x[:, noisy]
        return self.buffer[:, :end]


def _pieces(q: Tensor, chunks: Chunks) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Yield slices of rows and heads whose scores in one chunk are about `SCORES`, with biases."""
    rows, heads, queries, _ = q.shape
    largest = 2 * chunks.size * (chunks.length + chunks.size)
    biases: list[Tensor] = []
    for at in head_spans(q, SCORES, largest):
        if chunks.document_ids is not None or not biases:
            streams = queries // chunks.length
            row = torch.arange(rows)[at[0]].repeat_interleave(len(range(heads)[at[1]]))  # [P]
            biases = [chunks.bias(noisy, row, streams, q.dtype) for noisy, _ in chunks]
        yield at, biases


def _queries(x: Tensor, noisy: slice, clean: slice) -> Tensor:
    """Return a chunk's queries of [..., T, D]: noisy ones and, if x has them, clean ones."""
    queries = x[..., noisy, :]
    return queries if x.shape[-2] < clean.stop else torch.cat([queries, x[..., clean, :]], -2)


def _probabilities(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Return [P, queries, keys]: the softmax of one chunk's scores, whose last keys have a bias."""
    p = _scaled(queries, keys.mT, 1 / math.sqrt(queries.shape[-1]))
    p[..., -bias.shape[-1] :] += bias
    return torch.softmax(p, -1, out=p)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return a b times a number, [P, n, m], in one operation."""
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _put(out: Tensor, rows: Tensor, noisy: slice, clean: slice) -> None:
    """Write the rows [P, queries, D] of a chunk's queries to [rows, heads, T, D]."""
    size, rows = noisy.stop - noisy.start, rows.view(*out.shape[:2], *rows.shape[1:])
    out[:, :, noisy] = rows[:, :, :size]
    if rows.shape[2] > size:
        out[:, :, clean] = rows[:, :, size:]


def _add(whole: Tensor, grads: Tensor, noisy: slice, clean: slice) -> None:
    """Add the gradients of a chunk's keys or values to those of the input, [P, 2L, D].

    The last chunk comes first: it sees all of the clean stream, which has had none before.
    """
    length, end = clean.start - noisy.start, noisy.stop
    whole[:, noisy] = grads[:, end:]
    if end == length:
        whole[:, length:] = grads[:, :end]
    else:
        whole[:, length : length + end] += grads[:, :end]
