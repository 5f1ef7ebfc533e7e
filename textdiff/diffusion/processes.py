"""Absorbing, uniform and hybrid noise, and absorbing noise with a rate for each token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from textdiff.diffusion.process import ForwardProcess, Vocabulary, indicator
from textdiff.diffusion.schedule import HybridSchedule, Learned, NoiseSchedule
from textdiff.section import Tensor, torch


@dataclass(frozen=True)
class Absorbing(ForwardProcess):
    """Tokens become the mask and stay there (Sec. 3.1, arXiv:2406.07524)."""

    name = "absorbing"
    replaces_tokens = False
    masks_evenly = True

    @classmethod
    def under(cls, schedule: NoiseSchedule, vocabulary: Vocabulary) -> ForwardProcess:
        if isinstance(schedule, Learned):
            return AbsorbingByToken(vocabulary, schedule)
        return cls(vocabulary)

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - alpha, torch.zeros_like(alpha)

    def reveal_probability(self, log_x0: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Return the probability that a masked token is revealed between t and s < t.

        It is (alpha_s - alpha_t) / (1 - alpha_t) unless the mask itself is predicted, and then the
        mass that `posterior` gives clean tokens.

        Args:
            log_x0: [N, V] log-probabilities of a clean token or the mask.
            alpha_s: survival probability at the earlier time, scalar or [N].
            alpha_t: survival probability now.

        Returns:
            [N] float64.
        """
        at_mask = log_x0[:, self.mask_token_id].double().exp()
        clean = log_x0.masked_fill(~self.vocabulary.clean, -torch.inf).logsumexp(-1).double().exp()
        return clean * (alpha_s - alpha_t) / (1.0 - alpha_t + alpha_t * at_mask)


@dataclass(frozen=True)
class AbsorbingByToken(ForwardProcess):
    """Absorbing noise in which token v survives with 1 - t ** w_v (Eq. 11, arXiv:2406.04329).

    `alpha` is 1 - t for all tokens. What a masked position held depends on when it was masked, so
    predictions are p(x_0 | x_t) and posteriors average over them.

    Attributes:
        vocabulary: rows that are clean tokens.
        schedule: the learned schedule, which holds the exponents.
    """

    schedule: Learned

    name = "absorbing by token"
    replaces_tokens = False
    by_token = True

    def to(self, device: torch.device) -> Self:
        return replace(
            self, vocabulary=self.vocabulary.to(device), schedule=self.schedule.to(device)
        )

    @property
    def token_exponents(self) -> Tensor:
        """[V] float64 w."""
        return self.schedule.token_exponents(len(self.vocabulary.clean))

    def rate_exponents(self, x0: Tensor | None) -> Tensor:
        if x0 is None:
            raise ValueError("noise by token depends on the clean tokens, and there are none")
        return self.token_exponents[x0]

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        # Everything that is derived from one survival probability for all tokens calls this.
        raise ValueError("noise by token has neither scores nor transitions, which need one alpha")

    def log_score(self, log_x0: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        raise ValueError("noise by token has no scores, because its tokens do not share an alpha")

    def marginal(self, x0: Tensor, alpha: Tensor) -> Tensor:
        masked = (1.0 - alpha.double())[:, None] ** self.token_exponents * x0.double()  # [N, V]
        kept = x0.double() - masked
        kept[:, self.mask_token_id] += masked.sum(-1)
        return kept

    def posterior(
        self,
        log_x0: Tensor,
        xt: Tensor,
        alpha_s: Tensor,
        alpha_t: Tensor,
        mixture: bool = True,
    ) -> Tensor:
        if not mixture:
            raise ValueError("noise by token has posteriors of p(x_0 | x_t) only")
        # A masked v is still masked at s with probability (s / t) ** w_v.
        s, t = 1.0 - alpha_s.double(), 1.0 - alpha_t.double()
        ratio = torch.where(s == t, 1.0, s / t)[:, None]  # also where both are 0
        x0 = log_x0.double().exp()
        stays = ratio**self.token_exponents * x0
        back = x0 - stays
        back[:, self.mask_token_id] += stays.sum(-1)
        same = indicator(xt, x0.shape[-1])
        return torch.where((xt == self.mask_token_id)[:, None], back, same)


@dataclass(frozen=True)
class Uniform(ForwardProcess):
    """Tokens become uniformly drawn clean ones (Sec. 3.1, arXiv:2310.16834)."""

    name = "uniform"
    has_mask = False

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), (1.0 - alpha) / self.vocabulary.count


@dataclass(frozen=True)
class Hybrid(ForwardProcess):
    """Masks and uniform tokens at once (Sec. 3.2, arXiv:2503.04482).

    Attributes:
        vocabulary: rows that are clean tokens.
        schedule: the hybrid schedule, which also gives the share of uniform noise.
    """

    schedule: HybridSchedule

    name = "hybrid"

    @classmethod
    def under(cls, schedule: NoiseSchedule, vocabulary: Vocabulary) -> ForwardProcess:
        assert isinstance(schedule, HybridSchedule)
        return cls(vocabulary, schedule)

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        t = self.schedule.t_of_alpha(alpha)
        c = self.schedule.uniform_mass(t)
        return t / (1.0 + c), c / (1.0 + c) / self.vocabulary.count
