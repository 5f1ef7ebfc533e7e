"""What an objective is: the meaning of the network's output, and the nats it costs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from textdiff.diffusion.noise import Noise


@dataclass(frozen=True)
class Prediction:
    """What the network said about N positions.

    Attributes:
        log_x0: [N, V] float32 (float64 for a float64 network) log-probabilities of the clean token,
            exactly -inf for what is no clean token.
        log_score: [N, V] log ratios for objectives that predict them, else None.
    """

    log_x0: Tensor
    log_score: Tensor | None = None


class Objective(ABC):
    """Turns raw logits into a prediction, and a prediction into a bound.

    `time_free` objectives bound the likelihood by counts alone; their bound has no boundary terms.
    """

    @abstractmethod
    def positions(self, xt: Tensor) -> Tensor:
        """[B, L] bool: where predictions are used at all."""

    @abstractmethod
    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        """Reads raw logits [N, V] at tokens xt [N] and survival probabilities alpha [N]."""

    @abstractmethod
    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        """[N] nats: each position's share of the negative ELBO, weights included."""

    @abstractmethod
    def training_scale(self, noise: Noise) -> Tensor:
        """[N] float64 factor from `nelbo_terms` to the training loss (1: the bound itself)."""

    @abstractmethod
    def boundary_terms(self) -> dict[str, float]:
        """Nats per token that complete the bound drawn by count: reconstruction and prior."""
