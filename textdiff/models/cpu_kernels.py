"""Memory-bound steps of a Transformer block on a CPU, as functions with their own backward pass.

Each walks its tensors in chunks that stay near the core and writes its results once. Where they
do not apply (other devices, `torch.compile`) the same equations run as plain torch operations.

| function | equation |
|---|---|
| `dropout_add` | x + h m / (1 - p), m ~ Bernoulli(1 - p) |
| `rotate` | q, k, v from one projection, q and k turned by their positions |
| `half_attention` | softmax(q k^T / sqrt(D) + bias) v in half precision |

Shapes: B rows, T positions, H heads, D channels per head.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Bytes per thread of a chunk: of one of its tensors, or of its attention scores. Larger ones leave
# the cache; smaller ones gain nothing, and each operation on one is a barrier between threads: on
# two busy cores a step took three times as long at 2 ** 18 as at 2 ** 22.
CHUNK_BYTES = 2**22


def applies(x: Tensor) -> bool:
    """Return whether the chunked kernels run on this tensor: eagerly, on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def dropout_add(x: Tensor, h: Tensor, p: float, training: bool) -> Tensor:
    """Return x + dropout(h); on a CPU p, and the scale, are rounded to multiples of 1 / 65536."""
    if not training or p == 0.0:
        return x + h
    if p == 1.0 or not applies(x):
        return x + functional.dropout(h, p)
    return _DropoutAdd.apply(x, h, p)


def rotate(projected: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Turn queries and keys (or keys alone) in half-split form; values stay.

    Args:
        projected: [B, T, P, H, D]: queries, keys and values, or keys and values.
        cos: [T, D] cosines of the positions' angles, twice; [B, 1, T, D] where rows differ, which
            has no backward pass.
        sin: likewise, minus sines and sines.

    Returns:
        P tensors [B, H, T, D].
    """
    if applies(projected) and projected.requires_grad:
        half = cos.shape[-1] // 2
        return _Rotate.apply(projected, cos[..., half:], sin[..., half:])
    heads = projected.permute(2, 0, 3, 1, 4)
    return *_turned(heads[:-1], cos, sin), heads[-1]


def half_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend on a CPU in bfloat16 or float16, for training: [B, H, T, D] -> [B, H, T, D].

    The backward pass of torch's flash kernel is not faster than in float32 there; plain batched
    products over recomputed probabilities take half its time.

    Args:
        q: [B, H, T, D].
        k: [B, H, T, D].
        v: [B, H, T, D].
        mask: boolean, [T, T] or [B, 1, T, T], True where attention is allowed.
    """
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return _HalfAttention.apply(q, k, v, mask)


class _DropoutAdd(torch.autograd.Function):
    """Dropout whose mask costs 16 random bits per value; the bits are saved."""

    @staticmethod
    def forward(ctx, x, h, p):
        dropped = min(round(p * 2**16), 2**16 - 1)  # of the 2^16 values of an int16
        ctx.cut, ctx.scale, ctx.dtype = dropped - 2**15, 2**16 / (2**16 - dropped), h.dtype
        words = torch.empty(-(-h.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: h.numel()]
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, h.dtype))
        flat_x, flat_h = x.reshape(-1), h.reshape(-1)
        for chunk in _chunks(out):
            keep = _keep(bits[chunk], ctx.cut, out.dtype)
            value = flat_h[chunk].to(out.dtype)
            torch.addcmul(flat_x[chunk], value, keep, value=ctx.scale, out=out.view(-1)[chunk])
        ctx.save_for_backward(bits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        grad = grad.contiguous()
        grad_h = torch.empty(grad.shape, dtype=ctx.dtype)
        for chunk in _chunks(grad):
            keep = _keep(bits[chunk], ctx.cut, grad.dtype).mul_(ctx.scale)
            grad_h.view(-1)[chunk] = keep.mul_(grad.view(-1)[chunk])
        return grad, grad_h, None


class _Rotate(torch.autograd.Function):
    """Rotation that saves angles alone; gradients are turned back straight into one buffer."""

    @staticmethod
    def forward(ctx, projected, cos, sin):
        ctx.save_for_backward(cos, sin)
        out = torch.empty(*projected.permute(2, 0, 3, 1, 4).shape, dtype=projected.dtype)
        rows = _rows(projected)
        for source, target in zip(projected.split(rows), out.split(rows, dim=1), strict=True):
            source = source.permute(2, 0, 3, 1, 4)
            _turn(source[:-1], cos, sin, target[:-1])
            target[-1] = source[-1]
        return out.unbind()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        batch, heads, length, size = grads[0].shape
        out = torch.empty(batch, length, len(grads), heads, size, dtype=grads[0].dtype)
        rows = _rows(out)
        for target, *source in zip(out.split(rows), *(g.split(rows) for g in grads), strict=True):
            target = target.permute(2, 0, 3, 1, 4)
            for out_heads, grad in zip(target[:-1], source[:-1], strict=True):
                _turn(grad, cos, -sin, out_heads)
            target[-1] = source[-1]
        return out, None, None


class _HalfAttention(torch.autograd.Function):
    """Attention that recomputes its probabilities some heads at a time: linear in the length."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.save_for_backward(q, k, v, bias)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, bias = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        scale = 1 / math.sqrt(q.shape[-1])
        for at in head_spans(q, CHUNK_BYTES, q.shape[2] ** 2):
            shape = q[at].shape
            a, b, c, g = (x[at].flatten(0, 1) for x in (q, k, v, grad))  # [P, T, D]
            a = a * scale  # from here on the scores need no scaling
            p = torch.bmm(a, b.mT)  # [P, T, T]
            if bias is not None:
                p.view(*shape[:3], -1).add_(bias if bias.ndim == 2 else bias[at[0]])
            torch.softmax(p, -1, out=p)
            slopes = torch._softmax_backward_data(torch.bmm(g, c.mT), p, -1, p.dtype)
            pieces = torch.bmm(slopes, b).mul_(scale), torch.bmm(slopes.mT, a), torch.bmm(p.mT, g)
            for whole, piece in zip(grads, pieces, strict=True):
                whole[at] = piece.view(shape)
        return *grads, None


def spans(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover `total`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def head_spans(q: Tensor, bytes_per_thread: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of the rows and heads of [B, H, T, D]: heads of one row, or whole rows.

    Args:
        q: queries.
        bytes_per_thread: of the scores that are alive at once.
        scores: of one head.
    """
    rows, heads = q.shape[:2]
    room = max(1, bytes_per_thread * torch.get_num_threads() // (scores * q.itemsize))
    for row in spans(rows, max(1, room // heads)):
        for head in spans(heads, room):
            yield row, head


def _chunks(x: Tensor) -> Iterator[slice]:
    """Yield slices of a flattened tensor."""
    return spans(x.numel(), CHUNK_BYTES * torch.get_num_threads() // x.itemsize)


def _rows(qkv: Tensor) -> int:
    """Return how many rows [T, P, H, D] make a chunk."""
    return max(1, CHUNK_BYTES * torch.get_num_threads() // (qkv.shape[1:].numel() * qkv.itemsize))


def _keep(bits: Tensor, cut: int, dtype: torch.dtype) -> Tensor:
    """Return 1 where a value is kept, else 0."""
    return torch.ge(bits, cut, out=torch.empty(bits.shape, dtype=dtype))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [..., T, D], the halves of D being parts of complex numbers; see `rotate`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write to `out` what `_turned` returns, by angles [T, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
