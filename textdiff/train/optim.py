"""Optimizers and the learning rate as a pure function of the step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from textdiff.config import TrainConfig
from textdiff.train.muon import Muon


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW on everything, or Muon on the blocks' matrices and AdamW on the rest.

    Weight decay acts on matrices only; each group remembers its peak learning rate as `peak`.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if config.optimizer == "muon" and _is_block_matrix(name, p)]
    chosen = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in chosen]
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


def _is_block_matrix(name: str, parameter: Tensor) -> bool:
    return "blocks." in name and parameter.ndim == 2 and "adaLN" not in name


def lr_multiplier(step: int, config: TrainConfig) -> float:
    """Fraction of the peak learning rate at a step (counted from 0)."""
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
    """Sets every group's learning rate to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * multiplier
