"""Forward processes: how clean tokens are destroyed, and the exact posterior back.

States are the V vocabulary rows. The ids that are no clean token (mask, padding, what lies beyond
the tokenizer) are known here, so that no objective and no rule ever gives them probability.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.noise import Noise


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the vocabulary are clean tokens.

    Attributes:
        clean: [V] bool.
        mask_token_id: the absorbing state.
    """

    clean: Tensor
    mask_token_id: int

    @classmethod
    def of(cls, size: int, mask_token_id: int, excluded: Iterable[int] = ()) -> "Vocabulary":
        """A vocabulary of `size` rows without the mask and the `excluded` ids."""
        clean = torch.ones(size, dtype=torch.bool)
        clean[[mask_token_id, *excluded]] = False
        return cls(clean, mask_token_id)

    def to(self, device: torch.device) -> "Vocabulary":
        """The same vocabulary on another device."""
        return Vocabulary(self.clean.to(device), self.mask_token_id)


class ForwardProcess(ABC):
    """A Markov process on tokens with independent positions; randomness is passed in."""

    vocabulary: Vocabulary

    @abstractmethod
    def to(self, device: torch.device) -> "ForwardProcess":
        """The same process with its tables on another device."""

    @abstractmethod
    def prior(self, shape: tuple[int, ...], u: Tensor | None = None) -> Tensor:
        """Tokens at t = 1, int64 of `shape`."""

    @abstractmethod
    def corrupt(self, x0: Tensor, noise: Noise) -> Tensor:
        """x_t given x_0, both [B, L] int64."""

    @abstractmethod
    def posterior(self, log_x0: Tensor, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """q(x_s | x_t, x_0 ~ exp(log_x0)).

        Args:
            log_x0: [N, V] log-probabilities of the clean token.
            xt: [N] current tokens.
            alpha_s: [N] survival probability at the earlier time.
            alpha_t: [N] survival probability now, alpha_t <= alpha_s.

        Returns:
            [N, V] probabilities, float64.
        """


@dataclass(frozen=True)
class Absorbing(ForwardProcess):
    """Tokens turn into the mask and stay there (Sec. 3.1, arXiv:2406.07524)."""

    vocabulary: Vocabulary

    @property
    def mask_token_id(self) -> int:
        """The absorbing state."""
        return self.vocabulary.mask_token_id

    def to(self, device: torch.device) -> "Absorbing":
        return Absorbing(self.vocabulary.to(device))

    def prior(self, shape: tuple[int, ...], u: Tensor | None = None) -> Tensor:
        return torch.full(shape, self.mask_token_id)

    def corrupt(self, x0: Tensor, noise: Noise) -> Tensor:
        return x0.masked_fill(noise.hit, self.mask_token_id)

    def posterior(self, log_x0: Tensor, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Eq. 7, arXiv:2406.07524; a visible token stays what it is."""
        reveal = self.reveal_probability(alpha_s, alpha_t)
        back = log_x0.double().exp() * reveal.unsqueeze(-1)
        back[:, self.mask_token_id] += 1.0 - reveal
        stay = torch.nn.functional.one_hot(xt, log_x0.shape[-1]).double()
        return torch.where((xt == self.mask_token_id).unsqueeze(-1), back, stay)

    @staticmethod
    def reveal_probability(alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Probability that a masked token is revealed between t and s < t."""
        return (alpha_s - alpha_t) / (1.0 - alpha_t)


PROCESSES: dict[str, type[Absorbing]] = {"absorbing": Absorbing}
