"""The parts of a Transformer block that are memory-bound on a CPU, as functions with their own backward.

Each walks its tensors in chunks that stay in a core's cache, draws few random bits, and saves little. Where
they do not apply (other devices, `torch.compile`) the same equations run as plain torch operations.

| function | equation |
|---|---|
| `gelu` | x s(x), with s(x) = sigmoid(sqrt(8 / pi) (x + 0.044715 x^3)): the tanh-approximated GELU |
| `dropout_add` | x + h m / (1 - p), m ~ Bernoulli(1 - p) |
| `rotary_attention` | softmax(R q (R k)^T / sqrt(D) + bias) v, R the rotation by position |

Shapes: B rows, T positions, H heads, D channels per head.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# One chunk's largest temporary, per thread: a few of them share a core's second-level cache.
CHUNK_BYTES = 2**18
# Up to this length attention keeps its probabilities, which then cost about what an MLP's activations
# do; beyond it they are recomputed, so that memory grows linearly with the length.
KEEP_LENGTH = 512


# The argument of the GELU's sigmoid is x (_LINEAR + _CUBIC x^2).
_LINEAR = math.sqrt(8 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def applies(x: Tensor) -> bool:
    """Whether the chunked kernels run on this tensor: eagerly, on a CPU."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def gelu(x: Tensor) -> Tensor:
    """Tanh-approximated GELU."""
    return _Gelu.apply(x) if applies(x) else functional.gelu(x, approximate="tanh")


def dropout_add(x: Tensor, h: Tensor, p: float, training: bool) -> Tensor:
    """x + dropout(h); on a CPU p is rounded to a multiple of 1 / 65536, and the scale with it."""
    if not training or p == 0.0:
        return x + h
    return _DropoutAdd.apply(x, h, p) if applies(x) else x + functional.dropout(h, p)


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None) -> Tensor:
    """Rotary self-attention on a CPU.

    Args:
        qkv: [B, T, 3, H, D] queries, keys and values before rotation.
        cos: [T, D / 2].
        sin: [T, D / 2].
        bias: added to the scores, 0 or -inf: [T, T] or [B, 1, T, T].

    Returns:
        [B, T, H, D].
    """
    scale = torch.tensor([qkv.shape[-1] ** -0.5, 1.0], dtype=qkv.dtype).view(2, 1, 1, 1, 1)
    return _RotaryAttention.apply(qkv, scale * cos, scale * sin, bias)


class _Gelu(torch.autograd.Function):
    """Saves the slope s + x s (1 - s) s_0(x) instead of x, so that its backward is one product."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        out = torch.empty_like(x)
        slope = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        linear, one = torch.tensor([_LINEAR, 1.0], dtype=_wide(x))
        for part in _chunks(x):
            value = x.view(-1)[part].to(_wide(x))
            square = value * value
            gate = torch.add(linear, square, alpha=_CUBIC).mul_(value).sigmoid_()
            value = value * gate
            out.view(-1)[part] = value
            if slope is not None:
                bend = torch.add(linear, square, alpha=3 * _CUBIC, out=square).mul_(value)
                slope.view(-1)[part] = torch.lerp(bend, one, gate, out=gate)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class _DropoutAdd(torch.autograd.Function):
    """A mask costs 16 random bits per value, and the bits are what is saved."""

    @staticmethod
    def forward(ctx, x, h, p):
        dropped = round(p * 2**16)
        ctx.cut, ctx.scale, ctx.dtype = dropped - 2**15, 2**16 / max(1, 2**16 - dropped), h.dtype
        words = torch.empty(-(-h.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: h.numel()]
        out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, h.dtype))
        flat_x, flat_h = x.reshape(-1), h.reshape(-1)
        for part in _chunks(out):
            keep = _keep(bits[part], ctx.cut, out.dtype)
            value = flat_h[part].to(out.dtype)
            torch.addcmul(flat_x[part], value, keep, value=ctx.scale, out=out.view(-1)[part])
        ctx.save_for_backward(bits)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (bits,) = ctx.saved_tensors
        grad = grad.contiguous()
        grad_h = torch.empty(grad.shape, dtype=ctx.dtype)
        for part in _chunks(grad):
            keep = _keep(bits[part], ctx.cut, grad.dtype).mul_(ctx.scale)
            grad_h.view(-1)[part] = keep.mul_(grad.view(-1)[part])
        return grad, grad_h, None


class _RotaryAttention(torch.autograd.Function):
    """Rows and heads in pieces whose scores stay in cache; gradients go straight into one buffer."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, bias):
        rows, length, _, heads, size = qkv.shape
        packed = torch.empty(3, rows, heads, length, size, dtype=qkv.dtype)
        out = torch.empty(rows, length, heads, size, dtype=qkv.dtype)
        kept = None
        if ctx.needs_input_grad[0] and length <= KEEP_LENGTH:
            kept = torch.empty(rows, heads, length, length, dtype=qkv.dtype)
        for rows, heads in _pieces(qkv):
            source, turned = qkv[rows, :, :, heads].permute(2, 0, 3, 1, 4), packed[:, rows, heads]
            _rotate(source[:2], cos, sin, turned[:2])
            turned[2] = source[2]
            place = None if kept is None else kept[rows, heads]
            p = _probabilities(turned, bias, rows, place)
            mixed = torch.bmm(p.flatten(0, 1), turned[2].flatten(0, 1))
            out[rows, :, heads] = mixed.view_as(turned[2]).transpose(1, 2)
        ctx.save_for_backward(packed, cos, sin, bias, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        packed, cos, sin, bias, kept = ctx.saved_tensors
        _, count, total, length, size = packed.shape
        grad_qkv = torch.empty(count, length, 3, total, size, dtype=packed.dtype)
        for rows, heads in _pieces(grad_qkv):
            part = packed[:, rows, heads]
            p = _probabilities(part, bias, rows, None) if kept is None else kept[rows, heads]
            p, (q, k, v) = p.flatten(0, 1), part.flatten(1, 2)
            g = grad[rows, :, heads].to(v.dtype).transpose(1, 2).reshape(v.shape)
            target = grad_qkv[rows, :, :, heads].permute(2, 0, 3, 1, 4)
            target[2] = torch.bmm(p.transpose(1, 2), g).view_as(target[2])
            slopes = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            turned = torch.stack([torch.bmm(slopes, k), torch.bmm(slopes.transpose(1, 2), q)])
            _rotate(turned.view(2, *target.shape[1:]), cos, -sin, target[:2])
        return grad_qkv, None, None, None


def _chunks(x: Tensor) -> Iterator[slice]:
    """Slices of a flattened tensor."""
    step = CHUNK_BYTES * torch.get_num_threads() // _wide(x).itemsize
    return (slice(start, start + step) for start in range(0, x.numel(), step))


def _wide(x: Tensor) -> torch.dtype:
    """What a chunk is computed in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _keep(bits: Tensor, cut: int, dtype: torch.dtype) -> Tensor:
    """1 where a value is kept, else 0."""
    return torch.ge(bits, cut, out=torch.empty(bits.shape, dtype=dtype))


def _pieces(qkv: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and heads whose scores fit in cache: a few heads of one row, or whole rows."""
    rows, length, _, heads, _ = qkv.shape
    room = max(1, 4 * CHUNK_BYTES * torch.get_num_threads() // (length * length * qkv.itemsize))
    many, some = max(1, room // heads), min(room, heads)
    for row in range(0, rows, many):
        for head in range(0, heads, some):
            yield slice(row, row + many), slice(head, head + some)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Turns [..., T, D] by angles [..., T, D / 2] in half-split form; by -sin it turns back."""
    first, second = x.chunk(2, dim=-1)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)


def _probabilities(
    packed: Tensor, bias: Tensor | None, rows: slice, out: Tensor | None
) -> Tensor:
    """softmax(q k^T + bias) of a piece, [rows, heads, T, T]; q holds the scale already."""
    q, k, v = packed
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    scores = scores.view(*v.shape[:-1], -1)
    if bias is not None:
        scores.add_(bias if bias.ndim == 2 else bias[rows])
    return torch.softmax(scores, -1, out=scores if out is None else out)
