"""Muon with products in a precision that the device has.

torch's Muon orthogonalises in bfloat16 everywhere. Where a CPU only emulates bfloat16 that is a
hundred times slower than float32, and most of the time of a training step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from textdiff.train.precision import native_bf16

# The quintic a x + b x^3 + c x^5 takes every singular value in (0, 1] to about 1 in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(torch.optim.Muon):
    """Momentum whose update is made (nearly) orthogonal (arXiv:2502.16982, Sec. 2.1).

    The state and its names are torch's.

    Args:
        params: matrices.
        lr: learning rate; a matrix [m, n] takes max(1, m / n) ** 0.5 of it.
        weight_decay: decoupled decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
        momentum, beta = state["momentum_buffer"], group["momentum"]
        momentum.lerp_(p.grad, 1 - beta)
        ahead = p.grad.lerp(momentum, beta)  # Nesterov's
        rows, columns = p.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(orthogonal(ahead).to(p.dtype), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """U S' V^T of a matrix U S V^T, all of S' about 1, by Newton-Schulz iteration.

    Args:
        matrix: [m, n].

    Returns:
        [m, n], bfloat16 where the device has it and float32 elsewhere.
    """
    x = matrix.to(torch.bfloat16 if native_bf16(matrix.device) else torch.float32)
    wide = x.shape[0] <= x.shape[1]
    if not wide:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
