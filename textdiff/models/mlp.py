"""The MLPs: two products with an activation between them, and how a CPU trains them.

| `mlp` | equation |
|---|---|
| `gelu` | W2 gelu(W1 x + b1) + b2 |
| `swiglu` | W2 (silu(G x) * U x) |

On a CPU training walks the rows a few at a time, and keeps of each what the first product made of
it; the activation is made again in the backward pass. The tanh form of gelu is h s(z) with
z = sqrt(8 / pi) (h + 0.044715 h^3) and s the logistic function, for (1 + tanh(z / 2)) / 2 = s(z):
its value and its slope cost one exponential.

Shapes: N rows, H channels, I inner channels.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import cpu_kernels

# Values of an activation worked on at once, per thread: each of its operations reads and writes
# them, which should stay in the core's own cache.
PIECE = 2**17


class GeluMLP(nn.Sequential):
    """Linear, tanh-approximated GELU (arXiv:1606.08415), linear."""

    def __init__(self, size: int):
        super().__init__(
            nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        first, _, last = self
        if not _trains(x):
            return _in_rows(super().forward, x)
        return _MLP.apply(x, _Gelu, first.weight, first.bias, last.weight, last.bias)


class SwiGLU(nn.Module):
    """Gated MLP of 8/3 the width, as many parameters as the 4x one (arXiv:2002.05202)."""

    def __init__(self, size: int):
        super().__init__()
        inner = 64 * -(-8 * size // (3 * 64))
        self.gate_up = nn.Linear(size, 2 * inner, bias=False)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        if not _trains(x):
            return _in_rows(self._plain, x)
        return _MLP.apply(x, _SiluGate, self.gate_up.weight, None, self.down.weight, None)

    def _plain(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


MLPS: dict[str, Callable[[int], nn.Module]] = {"gelu": GeluMLP, "swiglu": SwiGLU}


class _Activation(Protocol):
    """From what the first product made, [N, I] or [N, 2I], to what the second one reads, [N, I]."""

    @staticmethod
    def value(h: Tensor, out: Tensor) -> None:
        """Writes the activation."""

    @staticmethod
    def slopes(h: Tensor, grad: Tensor, value: Tensor, out: Tensor) -> None:
        """Writes the activation, and its gradient by `h` from that by its value; may use `grad`."""


class _Gelu:
    c = math.sqrt(8 / math.pi)

    @classmethod
    def _z_by_h(cls, h: Tensor) -> Tensor:
        return torch.addcmul(h.new_full((1,), cls.c), h, h, value=0.044715 * cls.c)

    @classmethod
    def value(cls, h: Tensor, out: Tensor) -> None:
        torch.mul(h, cls._z_by_h(h).mul_(h).sigmoid_(), out=out)

    @classmethod
    def slopes(cls, h: Tensor, grad: Tensor, value: Tensor, out: Tensor) -> None:
        z = cls._z_by_h(h).mul_(h)
        s = z.sigmoid()
        torch.mul(h, s, out=value)
        slope = z.mul_(3).sub_(h, alpha=2 * cls.c)  # h dz/dh
        slope.addcmul_(slope, s, value=-1).add_(1).mul_(s)  # s + h s (1 - s) dz/dh
        torch.mul(grad, slope, out=out)


class _SiluGate:
    @staticmethod
    def value(h: Tensor, out: Tensor) -> None:
        gate, up = h.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), up, out=out)

    @staticmethod
    def slopes(h: Tensor, grad: Tensor, value: Tensor, out: Tensor) -> None:
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
        flat = x.reshape(-1, x.shape[-1])
        h = x.new_empty(len(flat), len(w1))
        out = x.new_empty(len(flat), len(w2))
        values = x.new_empty(_rows(x), w2.shape[1])
        for part in _parts(len(flat), len(values)):
            _affine(flat[part], w1, b1, h[part])
            value = values[: len(flat[part])]
            for piece in _parts(len(value), _piece(value)):
                activation.value(h[part][piece], value[piece])
            _affine(value, w2, b2, out[part])
        ctx.save_for_backward(flat, h, w1, w2)
        ctx.biases = b1 is not None, b2 is not None
        return out.view(*x.shape[:-1], len(w2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, h, w1, w2 = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        to_x, to_w1, to_w2 = torch.empty_like(x), torch.zeros_like(w1), torch.zeros_like(w2)
        to_b1, to_b2 = w1.new_zeros(len(w1)), flat.sum(0)
        values = x.new_empty(_rows(x), w2.shape[1])
        grads, slopes = torch.empty_like(values), x.new_empty(len(values), len(w1))
        for part in _parts(len(x), len(values)):
            g, rows = flat[part], len(x[part])
            value, slope = values[:rows], slopes[:rows]
            by_value = torch.mm(g, w2, out=grads[:rows])
            for piece in _parts(rows, _piece(value)):
                ctx.activation.slopes(h[part][piece], by_value[piece], value[piece], slope[piece])
            to_w2.addmm_(g.t(), value)
            to_w1.addmm_(slope.t(), x[part])
            to_b1 += slope.sum(0)
            torch.mm(slope, w1, out=to_x[part])
        first, last = ctx.biases
        to_b1, to_b2 = to_b1 if first else None, to_b2 if last else None
        return to_x.view(grad.shape), None, to_w1, to_b1, to_w2, to_b2


def _trains(x: Tensor) -> bool:
    """Whether `_MLP` applies: half precision gains nothing from it."""
    if not (cpu_kernels.applies(x) and torch.is_grad_enabled()):
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Writes x W^T + b."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _rows(x: Tensor) -> int:
    """How many rows of x are worked on at once.

    What is made of them on the way, up to eight times as wide, should stay near the core, and below
    the 32 MiB from which on glibc takes a buffer from the system anew every time, cleared.
    """
    room = 2 * cpu_kernels.CHUNK_BYTES * torch.get_num_threads()
    return max(1, min(x.numel() // x.shape[-1], room // (8 * x.shape[-1] * x.itemsize)))


def _piece(x: Tensor) -> int:
    """How many rows of an activation are worked on at once."""
    return max(1, PIECE * torch.get_num_threads() // x.shape[-1])


def _parts(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _in_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of rows [..., H], on a CPU applied to few enough of them at a time."""
    if (
        not cpu_kernels.applies(x) or not x.numel()
    ):  # first, for the number of threads breaks a graph
        return function(x)
    rows = max(1, _rows(x) // max(1, x[0].numel() // x.shape[-1]))
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(part) for part in x.split(rows)])
