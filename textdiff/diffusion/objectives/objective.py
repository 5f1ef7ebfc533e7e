"""What an objective is: the meaning of the network's output, and the nats it costs."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import ForwardProcess, Vocabulary


class Prediction:
    """What the network said about N positions.

    Args:
        log_x0: [N, V] float32 (float64 for a float64 network) log-probabilities of the clean token,
            exactly -inf for what is no clean token; or a function that computes them when asked.
        log_score: [N, V] log ratios for objectives that predict them, else None.
        mixture: whether `log_x0` is p(x_0 | x_t) and posteriors are to be averaged over it; else it
            is plugged into them.
        log_state: [N, V] log-probabilities of a clean token or the mask for objectives whose
            network may predict the mask, else None; `log_x0` is then given that it does not.
    """

    def __init__(
        self,
        log_x0: Tensor | Callable[[], Tensor],
        log_score: Tensor | None = None,
        mixture: bool = False,
        log_state: Tensor | None = None,
    ):
        self._log_x0 = log_x0
        self.log_score = log_score
        self.mixture = mixture
        self.log_state = log_state

    @cached_property
    def log_x0(self) -> Tensor:
        """[N, V] log-probabilities of the clean token."""
        return self._log_x0 if isinstance(self._log_x0, Tensor) else self._log_x0()

    def at(self, index: Tensor) -> "Prediction":
        """The predictions of some of the positions, [n] into N."""
        score, state = self.log_score, self.log_state
        return Prediction(
            lambda: self.log_x0[index],
            None if score is None else score[index],
            self.mixture,
            None if state is None else state[index],
        )


@dataclass(frozen=True)
class Objective(ABC):
    """Turns raw logits into a prediction, and a prediction into a bound.

    Attributes:
        process: the forward process.
        scores_all_positions: whether every position contributes to the bound, not only corrupted
            ones.
        shifted: whether the network reads clean tokens one position late, left to right.
        predicts_score: whether predictions hold ratios of probabilities, as scores are.
        heavy_tailed: whether costs may grow like the exponential of the network's outputs, or
            without limit near the clean end; else they grow like a cross-entropy.
        processes: names of the processes that the objective is defined for.
    """

    process: ForwardProcess

    scores_all_positions: ClassVar[bool] = False
    shifted: ClassVar[bool] = False
    predicts_score: ClassVar[bool] = False
    heavy_tailed: ClassVar[bool] = True
    processes: ClassVar[tuple[str, ...]]

    @property
    def vocabulary(self) -> Vocabulary:
        """Which rows are clean tokens."""
        return self.process.vocabulary

    @property
    def predicts_mask(self) -> bool:
        """Whether the network may predict the mask, and so decides when a mask is revealed."""
        return False

    @property
    def outputs(self) -> Tensor:
        """[V] bool: the network's outputs that predictions read."""
        return self.vocabulary.clean

    def positions(self, noise: Noise) -> Tensor:
        """[B, L] bool: where predictions are used at all."""
        return noise.scorable if self.scores_all_positions else noise.corrupted

    @abstractmethod
    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        """Reads raw logits [N, V] at tokens xt [N] and survival probabilities alpha [N]."""

    @abstractmethod
    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        """[N] float64 nats: each position's share of the negative ELBO, weights included."""

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        """[N] what training minimises, made from the negative ELBO's terms; here the terms."""
        return nelbo


def wide(logits: Tensor) -> Tensor:
    """Logits in float32, or in float64 where the network computes in it."""
    return logits if logits.dtype == torch.float64 else logits.float()


def clean_log_softmax(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[N, V] log-probabilities over clean tokens, exactly -inf elsewhere."""
    return wide(logits).masked_fill(~vocabulary.clean, -torch.inf).log_softmax(-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """[N] float64: values [N, V] at one column each."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1).double()
