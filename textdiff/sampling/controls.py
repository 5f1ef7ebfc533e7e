"""The one place where temperature and truncation act, after confidences were read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.errors import ConfigError


@dataclass(frozen=True)
class Controls:
    """How the drawing distribution departs from the model's.

    Attributes:
        temperature: divides log-probabilities; 0 takes the most likely token.
        top_k: only the k most likely tokens; None: all.
        top_p: only the most likely tokens up to this much probability, the one that crosses it
            included (1: all).

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature {self.temperature}: give 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k}: give 1 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p {self.top_p}: give more than 0 and at most 1")

    def probabilities(self, log_x0: Tensor) -> Tensor:
        """[N, V] float64 weights to draw from; they need not add up to one."""
        logits = log_x0.double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            smallest = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        weights = logits.softmax(-1)
        if self.top_p < 1.0:
            ordered, order = weights.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(
                -1, order, before < self.top_p
            )
            weights = weights.masked_fill(~kept, 0.0)
        return weights

    def log_probabilities(self, log_x0: Tensor) -> Tensor:
        """[N, V] float64 log-probabilities of the clean token, for rules that need them whole."""
        if self.temperature == 0.0:
            best = log_x0.argmax(-1, keepdim=True)
            return torch.full_like(log_x0, -torch.inf, dtype=torch.float64).scatter(-1, best, 0.0)
        weights = self.probabilities(log_x0)
        return (weights / weights.sum(-1, keepdim=True)).log()
