"""MLPs on a CPU: some rows at a time, and in training by a backward pass of their own.

Training keeps the result of the first product alone; the activation is made again in the backward
pass. The tanh form of gelu is h s(z) with z = sqrt(8 / pi) (h + 0.044715 h^3). Here s is the
logistic function, for (1 + tanh(z / 2)) / 2 = s(z): its value and its slope cost one exponential.

Shapes: N rows, H channels, I inner channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import cpu_kernels

# Values of an activation worked on at once, per thread: each of its operations reads and writes
# them, which should stay in the core's own cache.
PIECE = 2**17


def trains_on_cpu(x: Tensor) -> bool:
    """Return whether the MLPs' own backward pass applies; half precision gains nothing from it."""
    if not (cpu_kernels.applies(x) and torch.is_grad_enabled()):
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of rows [..., H], on a CPU to some of them at a time."""
    # Asked first, because the number of threads breaks a graph.
    if not cpu_kernels.applies(x) or not x.numel():
        return function(x)
    rows = max(1, _rows(x) // max(1, x[0].numel() // x.shape[-1]))
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(piece) for piece in x.split(rows)])


def gelu_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """W2 gelu(W1 x + b1) + b2."""
    return _MLP.apply(x, Gelu, w1, b1, w2, b2)


def swiglu_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """W2 (silu(G x) * U x), G and U one matrix."""
    return _MLP.apply(x, SiluGate, gate_up, None, down, None)


class Gelu:
    """Activation [N, I] of the first product's result h [N, I]."""

    c = math.sqrt(8 / math.pi)

    @classmethod
    def value(cls, h: Tensor, out: Tensor) -> None:
        """Write the activation."""
        torch.mul(h, cls._z_by_h(h).mul_(h).sigmoid_(), out=out)

    @classmethod
    def slopes(cls, h: Tensor, grad: Tensor, value: Tensor, out: Tensor) -> None:
        """Write the activation, and its gradient by h from that by its value; may use `grad`."""
        z = cls._z_by_h(h).mul_(h)
        s = z.sigmoid()
        torch.mul(h, s, out=value)
        slope = z.mul_(3).sub_(h, alpha=2 * cls.c)  # h dz/dh
        slope.addcmul_(slope, s, value=-1).add_(1).mul_(s)  # s + h s (1 - s) dz/dh
        torch.mul(grad, slope, out=out)

    @classmethod
    def _z_by_h(cls, h: Tensor) -> Tensor:
        return torch.addcmul(h.new_full((1,), cls.c), h, h, value=0.044715 * cls.c)


class SiluGate:
    """Activation [N, I] of the first product's result h [N, 2I]: gate and up."""

    @staticmethod
    def value(h: Tensor, out: Tensor) -> None:
        """Write the activation."""
        gate, up = h.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), up, out=out)

    @staticmethod
    def slopes(h: Tensor, grad: Tensor, value: Tensor, out: Tensor) -> None:
        """Write the activation, and its gradient by h from that by its value; may use `grad`."""
        gate, up = h.chunk(2, dim=-1)
        to_gate, to_up = out.chunk(2, dim=-1)
        s = gate.sigmoid()
        torch.mul(gate, s, out=value)  # silu; its slope is s + value (1 - s)
        slope = torch.addcmul(value, value, s, value=-1).add_(s)
        torch.mul(grad, value, out=to_up)
        torch.mul(grad.mul_(up), slope, out=to_gate)
        value.mul_(up)


class _MLP(torch.autograd.Function):
    """W2 a(W1 x + b1) + b2; biases may be None."""

    @staticmethod
    def forward(ctx, x, activation, w1, b1, w2, b2):
        ctx.activation = activation
        flat = x.reshape(-1, x.shape[-1])  # [N, H]
        h = x.new_empty(len(flat), len(w1))  # [N, I or 2I]
        out = x.new_empty(len(flat), len(w2))  # [N, H]
        values = x.new_empty(_rows(x), w2.shape[1])  # [rows, I]
        for rows in cpu_kernels.spans(len(flat), len(values)):
            _affine(flat[rows], w1, b1, h[rows])
            value = values[: len(flat[rows])]
            for piece in cpu_kernels.spans(len(value), _piece(value)):
                activation.value(h[rows][piece], value[piece])
            _affine(value, w2, b2, out[rows])
        ctx.save_for_backward(flat, h, w1, w2)
        ctx.biases = b1 is not None, b2 is not None
        return out.view(*x.shape[:-1], len(w2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, h, w1, w2 = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])  # [N, H]
        to_x, to_w1, to_w2 = torch.empty_like(x), torch.zeros_like(w1), torch.zeros_like(w2)
        to_b1, to_b2 = w1.new_zeros(len(w1)), flat.sum(0)
        values = x.new_empty(_rows(x), w2.shape[1])  # [rows, I]
        grads, slopes = torch.empty_like(values), x.new_empty(len(values), len(w1))
        for rows in cpu_kernels.spans(len(x), len(values)):
            g, count = flat[rows], len(x[rows])
            value, slope = values[:count], slopes[:count]
            by_value = torch.mm(g, w2, out=grads[:count])
            for piece in cpu_kernels.spans(count, _piece(value)):
                ctx.activation.slopes(h[rows][piece], by_value[piece], value[piece], slope[piece])
            to_w2.addmm_(g.t(), value)
            to_w1.addmm_(slope.t(), x[rows])
            to_b1 += slope.sum(0)
            torch.mm(slope, w1, out=to_x[rows])
        first, last = ctx.biases
        to_b1, to_b2 = to_b1 if first else None, to_b2 if last else None
        return to_x.view(grad.shape), None, to_w1, to_b1, to_w2, to_b2


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write x W^T + b."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _rows(x: Tensor) -> int:
    """Return how many rows of x are worked on at once.

    Their intermediate values, up to eight times as wide, should stay near the core. They should
    also stay below the 32 MiB from which on glibc takes a buffer from the system anew every time,
    cleared.
    """
    room = 2 * cpu_kernels.CHUNK_BYTES * torch.get_num_threads()
    return max(1, min(x.numel() // x.shape[-1], room // (8 * x.shape[-1] * x.itemsize)))


def _piece(x: Tensor) -> int:
    """Return how many rows of an activation are worked on at once."""
    return max(1, PIECE * torch.get_num_threads() // x.shape[-1])
