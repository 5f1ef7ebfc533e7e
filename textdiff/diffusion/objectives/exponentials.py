"""Sums of exponentials of log-scores, also where they are beyond the log-scores' own dtype.

exp(x) overflows float32 beyond x = 88.7 and float64 beyond 709.7. The sums here are float64 and
taken relative to each row's largest log-score where that is beyond `SAFE`. Up to there they are
what the dtype gives, bit for bit. A gradient too large for the dtype is its largest number.
"""

from typing import Any

import torch
from torch import Tensor

SAFE = {torch.float32: 60.0, torch.float64: 600.0}
"""Log-scores up to these leave room for sums over a vocabulary and for the weights of a loss."""


def sum_of_exponentials(x: Tensor) -> Tensor:
    """Return [N] float64 sums of exp(x) over the columns of x [N, V]; -inf counts 0."""
    return _Sum.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def sum_of_excess(x: Tensor) -> Tensor:
    """Return [N] float64 sums of exp(x) - 1 - x over the columns of finite x [N, V].

    It is small where all of x is; the difference of the sums would cancel.
    """
    return _Excess.apply(x)  # type: ignore[no-any-return,no-untyped-call]


def total(x: Tensor) -> Tensor:
    """Return [N] float64 sums of x [N, V] over columns, in its own dtype where that suffices."""
    sums = x.sum(-1).double()
    if x.device.type == "cpu" and bool(sums.isfinite().all()):
        return sums
    return torch.where(sums.isfinite(), sums, x.sum(-1, dtype=torch.float64))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        beyond = _beyond(x)
        scaled = (x - beyond).exp()
        ctx.save_for_backward(scaled, beyond)
        return scaled.sum(-1).double() * beyond.squeeze(-1).double().exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        scaled, beyond = ctx.saved_tensors
        return _raised(scaled, beyond, grad)


class _Excess(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        beyond = _beyond(x)
        scaled = torch.expm1(x - beyond)
        ctx.save_for_backward(scaled, beyond)
        near = total(scaled - x)
        if _is_zero(beyond):
            return near
        beyond, count = beyond.squeeze(-1).double(), x.shape[-1]
        far = (scaled.sum(-1).double() + count) * beyond.exp() - count - total(x)
        return torch.where(beyond > 0.0, far, near)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        scaled, beyond = ctx.saved_tensors
        return _raised(scaled + 1.0, beyond, grad).sub_(grad[:, None].to(scaled.dtype))


def _beyond(x: Tensor) -> Tensor:
    """Return [N, 1] the excess of each row's largest value over what is safe."""
    return (x.amax(-1, keepdim=True) - SAFE[x.dtype]).clamp(min=0.0)


def _is_zero(beyond: Tensor) -> bool:
    """Return whether no row is beyond; false on a device, where reading would wait for it."""
    return beyond.device.type == "cpu" and not bool(beyond.any())


def _raised(scaled: Tensor, beyond: Tensor, grad: Tensor) -> Tensor:
    """Return [N, V] grad [N] times scaled exp(beyond), at most the dtype's largest number.

    In two factors that the dtype holds: their product with a small `scaled` may be ordinary.
    """
    most = torch.finfo(scaled.dtype).max
    factor = grad[:, None] * beyond.double().exp()
    first = factor.clamp(-most, most).to(scaled.dtype)
    if _is_zero(beyond):
        return scaled * first
    second = (factor.abs() / most).clamp(1.0, most).to(scaled.dtype)
    return (scaled * first).mul_(second).clamp_(-most, most)
