"""Exponential moving average of the weights: what is evaluated, sampled from and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from textdiff.train.distributed import load_tensors


class EMA:
    """Averaged parameters, float32.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so early averages do not remember the
    initialisation. A decay of 0 follows the weights themselves. Averages of sharded parameters are
    sharded like them.

    Args:
        model: whose parameters are averaged.
        decay: final decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.names = [name for name, _ in model.named_parameters()]
        self.shadow = [p.detach().clone() for p in model.parameters()]
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in model.parameters()], 1.0 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model, in evaluation mode, while entered."""
        parameters = list(model.parameters())
        kept = [p.data for p in parameters]
        training = model.training
        model.eval()
        try:
            for parameter, average in zip(parameters, self.shadow, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data
            model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.shadow, strict=True))

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Restore averages and their count."""
        self.updates = updates
        load_tensors(self.state_dict(), state)
