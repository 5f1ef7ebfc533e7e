"""Optimizers and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from textdiff.config import TrainConfig
from textdiff.models import Denoiser
from textdiff.train.owners import MatrixGroups, apply_by_owners, own_rows

# The quintic a x + b x^3 + c x^5 takes every singular value in (0, 1] to about 1 in five rounds.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def build_optimizers(model: Denoiser, config: TrainConfig) -> list[Optimizer]:
    """Build AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    Weight decay acts on matrices only; each group remembers its peak learning rate as `peak`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    chosen = {id(p) for p in model.block_matrices()} if config.optimizer == "muon" else set()
    inner = [p for p in trained if id(p) in chosen]
    rest = [p for p in trained if id(p) not in chosen]
    matrices = [p for p in rest if p.ndim >= 2]
    vectors = [p for p in rest if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            fused=all(p.device.type in ("cpu", "cuda") for p in rest),
        )
    ]
    if inner:
        optimizers.append(
            Muon(inner, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def lr_multiplier(step: int, config: TrainConfig) -> float:
    """Return the fraction of the peak learning rate at a step (counted from 0)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    if config.lr_schedule == "cosine":
        span = max(1, config.steps - config.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - config.warmup_steps) / span)))
    left = (config.steps - step) / (config.decay_fraction * config.steps)
    return max(0.0, min(1.0, left))


def set_learning_rate(optimizers: Sequence[Optimizer], multiplier: float) -> None:
    """Set every group's learning rate to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * multiplier


class Muon(torch.optim.Muon):
    """Muon: momentum whose update is made (nearly) orthogonal (arXiv:2502.16982, Sec. 2.1).

    torch's Muon orthogonalises in bfloat16 everywhere. Where a CPU only emulates bfloat16, that is
    a hundred times slower than float32, and most of the time of a training step. This one
    multiplies in a precision that the device has. Among several processes each matrix has an owner
    that orthogonalises it.

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
        """Take one step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first = 0
            for alike in _rounds([p for p in group["params"] if p.grad is not None]):
                groups, rows = MatrixGroups.of(alike[0]), alike[0].shape[0]
                ahead = [self._ahead(p, group) for p in alike]
                if groups.alone:
                    updates = [orthogonal(matrix) for matrix in ahead]
                else:
                    updates = apply_by_owners(ahead, rows, groups, first, orthogonal)
                for p, update in zip(alike, updates, strict=True):
                    self._move(p, update, group)
                first += len(alike)
        return loss

    def _ahead(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Return this process's rows of Nesterov's momentum, in the dtype of the iteration."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
        momentum, beta = state["momentum_buffer"], group["momentum"]
        momentum.lerp_(p.grad, 1 - beta)
        return own_rows(p.grad.lerp(momentum, beta)).to(iteration_dtype(p.device))

    def _move(self, p: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        rows, columns = p.shape
        p.mul_(1 - group["lr"] * group["weight_decay"])
        own_rows(p).add_(update.to(p.dtype), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _rounds(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Return which matrices are orthogonalised together: those of a shape, or one in one process.

    One by one, a process needs memory for one update at a time.
    """
    if not parameters or MatrixGroups.of(parameters[0]).alone:
        return [[p] for p in parameters]
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault(p.shape, []).append(p)
    return list(by_shape.values())


def orthogonal(matrix: Tensor) -> Tensor:
    """Return U S' V^T of a matrix U S V^T, all of S' about 1, by Newton-Schulz iteration.

    Args:
        matrix: [m, n], or [k, m, n] for several of them.

    Returns:
        The same shape, in `iteration_dtype`.
    """
    x = matrix.to(iteration_dtype(matrix.device))
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    several = x.ndim == 3
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) if several else x.norm()
    x = x / norm.clamp(min=1e-7)
    add = torch.baddbmm if several else torch.addmm
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that matrices are orthogonalised in: bfloat16 where a device has it."""
    return torch.bfloat16 if native_bf16(device) else torch.float32


def native_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 matrix products run in hardware here, not by emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return bool(able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16"))
    return False


def resolve_precision(wanted: str, device: torch.device) -> str:
    """Return `bf16` or `fp32`, with `auto` resolved."""
    if wanted != "auto":
        return wanted
    return "bf16" if native_bf16(device) else "fp32"
