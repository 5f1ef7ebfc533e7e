"""Forward processes: how clean tokens are destroyed, and the exact way back.

All of them are one Markov process. A token survives until the noise level `alpha` with that
probability; if it does not, it has become the mask or a uniformly drawn clean token. Absorbing,
uniform and hybrid noise differ in nothing but how the lost mass is shared between the two
(`shares`); marginals, transitions, posteriors and scores follow from it, here, once.

States are the V vocabulary rows. The ids that are no clean token (mask, padding, what lies beyond
the tokenizer) are known here, so that no objective and no rule ever gives them probability.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.schedule import Hybrid as HybridSchedule
from textdiff.diffusion.schedule import Learned, NoiseSchedule


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of the vocabulary are clean tokens.

    Attributes:
        clean: [V] bool.
        ids: [K] int64, the clean ids in ascending order.
        mask_token_id: the absorbing state.
    """

    clean: Tensor
    ids: Tensor
    mask_token_id: int

    @classmethod
    def of(cls, size: int, mask_token_id: int, excluded: Iterable[int] = ()) -> "Vocabulary":
        """A vocabulary of `size` rows without the mask and the `excluded` ids."""
        clean = torch.ones(size, dtype=torch.bool)
        clean[[mask_token_id, *excluded]] = False
        return cls(clean, clean.nonzero().squeeze(1), mask_token_id)

    @property
    def count(self) -> int:
        """K, the number of clean tokens."""
        return len(self.ids)

    def to(self, device: torch.device) -> "Vocabulary":
        """The same vocabulary on another device."""
        return Vocabulary(self.clean.to(device), self.ids.to(device), self.mask_token_id)


@dataclass(frozen=True)
class ForwardProcess(ABC):
    """A Markov process on tokens with independent positions; randomness is passed in.

    At survival probability alpha a token x is distributed as

        q(z | x) = alpha [z = x] + m [z is the mask] + b [z is clean],   alpha + m + K b = 1,

    where (m, b) = `shares(alpha)`. Letters: N positions, V rows, K clean tokens; s is earlier
    (cleaner) than t. Results are float64.
    """

    vocabulary: Vocabulary

    name: ClassVar[str]
    has_mask: ClassVar[bool] = True
    replaces_tokens: ClassVar[bool] = True
    by_token: ClassVar[bool] = False  # whether some tokens are lost faster than others

    @abstractmethod
    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Mass at the mask and at each clean token of what did not survive, of `alpha`'s shape."""

    @property
    def mask_token_id(self) -> int:
        """The absorbing state."""
        return self.vocabulary.mask_token_id

    def to(self, device: torch.device) -> Self:
        """The same process with its tables on another device."""
        return replace(self, vocabulary=self.vocabulary.to(device))

    # --- forward ---

    def prior(self, shape: tuple[int, ...], u: Tensor | None = None) -> Tensor:
        """Tokens at alpha = 0, int64 of `shape`.

        Args:
            shape: shape of the result.
            u: uniforms of that shape, where tokens are drawn at random.
        """
        return self._lost(torch.zeros((), dtype=torch.float64), u).expand(shape).contiguous()

    def rate_exponents(self, x0: Tensor | None) -> Tensor | None:
        """[B, L] how fast each position is lost, 1 - alpha to that power; None: all alike."""
        return None

    def corrupt(self, x0: Tensor, noise: Noise) -> Tensor:
        """x_t given x_0, both [B, L] int64."""
        return torch.where(noise.corrupted, self._lost(noise.alpha, noise.u_token), x0)

    def _lost(self, alpha: Tensor, u: Tensor | None) -> Tensor:
        """What tokens become that do not survive: the mask, or a clean one by one uniform each."""
        mask = torch.tensor(self.mask_token_id, device=self.vocabulary.ids.device)
        if not self.replaces_tokens:
            return mask
        if u is None:
            raise ValueError(f"{type(self).__name__} noise draws tokens and needs uniforms")
        m, b = self.shares(alpha)
        count = self.vocabulary.count
        masked = m / (m + count * b).clamp(min=torch.finfo(torch.float64).tiny)
        index = ((u - masked) / (1.0 - masked) * count).to(torch.int64).clamp(0, count - 1)
        return torch.where(u < masked, mask, self.vocabulary.ids[index])

    def marginal(self, x0: Tensor, alpha: Tensor) -> Tensor:
        """q(. | x_0 ~ x0) at one noise level.

        Args:
            x0: [N, V] probabilities of the clean token.
            alpha: [N] survival probability.

        Returns:
            [N, V] probabilities.
        """
        m, b = self.shares(alpha.double())
        return alpha.double()[:, None] * x0.double() + self._spread(m, b)

    def transition(self, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """[V, V] q(x_t = row | x_s = column): exp of the integrated rate matrix, in closed form.

        For noise of one kind it is exp((sigma_t - sigma_s) Q) with Q = target 1^T - I (Sec. 3.1,
        arXiv:2310.16834). Rows and columns that are no states are zero.
        """
        ratio, m, b = self._between(alpha_s.double().view(1), alpha_t.double().view(1))
        states = self._states.double()
        spread = self._spread(m, b).view(-1, 1)
        return torch.diag(ratio * states) + spread * states

    def prior_kl(self, alpha: float) -> float:
        """KL(q(. | x) || prior) in nats per token where noise ends at `alpha`; may be infinite."""
        end = torch.tensor([alpha], dtype=torch.float64)
        one = functional.one_hot(self.vocabulary.ids[:1].cpu(), len(self.vocabulary.clean))
        host = self.to(torch.device("cpu"))
        q = host.marginal(one, end)
        p = host.marginal(one, torch.zeros_like(end))
        return float(torch.where(q > 0.0, q * (q / p).log(), 0.0).sum())

    # --- backward ---

    def likelihood(self, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """[N, V] q(x_t | x_s = y) for every state y, of given x_t [N]."""
        ratio, m, b = self._between(alpha_s.double(), alpha_t.double())
        arrived = torch.where(xt == self.mask_token_id, m, b)
        same = functional.one_hot(xt, len(self.vocabulary.clean)).double()
        return (ratio[:, None] * same + arrived[:, None]) * self._states

    def posterior(
        self,
        log_x0: Tensor,
        xt: Tensor,
        alpha_s: Tensor,
        alpha_t: Tensor,
        mixture: bool = False,
    ) -> Tensor:
        """q(x_s | x_t, x_0 ~ exp(log_x0)) by Bayes' rule.

        Args:
            log_x0: [N, V] log-probabilities of the clean token.
            xt: [N] current tokens.
            alpha_s: [N] survival probability at the earlier time.
            alpha_t: [N] survival probability now, alpha_t <= alpha_s.
            mixture: read log_x0 as p(x_0 | x_t) and average the posteriors of single tokens (Eq. 4,
                arXiv:2107.03006); else as a distribution that does not know x_t, plugged into the
                formula (Eq. 16, arXiv:2406.07524).

        Returns:
            [N, V] probabilities. Where noise cannot make a token, a visible one stays what it is.
        """
        x0 = log_x0.double().exp()
        alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
        back = self._mixed(x0, xt, alpha_s, alpha_t) if mixture else self.marginal(x0, alpha_s)
        back = back * self.likelihood(xt, alpha_s, alpha_t)
        total = back.sum(-1, keepdim=True)
        stay = functional.one_hot(xt, log_x0.shape[-1]).double()
        # Without noise only what is predicted at x_t itself counts, and it may have underflowed.
        back = torch.where(total == 0.0, stay, back / total)
        if self.replaces_tokens:
            return back
        return torch.where((xt == self.mask_token_id)[:, None], back, stay)

    def _mixed(self, x0: Tensor, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """sum over w of x0(w) q(. | w) at s, each over q(x_t | w)."""
        m, b = self.shares(alpha_t)
        arrived = torch.where(xt == self.mask_token_id, m, b)
        same = functional.one_hot(xt, x0.shape[-1]).double()
        chance = alpha_t[:, None] * same + arrived[:, None]  # of x_t, by clean token
        odds = (x0 / chance).where((x0 > 0.0) & (chance > 0.0), 0.0)
        m, b = self.shares(alpha_s)
        return alpha_s[:, None] * odds + odds.sum(-1, keepdim=True) * self._spread(m, b)

    # --- scores ---

    def log_score(self, log_x0: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        """[N, V] log q(y) - log q(x_t) at one noise level, of x_0 ~ exp(log_x0)."""
        q = self.marginal(log_x0.double().exp(), alpha).log()
        return q - q.gather(-1, xt[:, None])

    def log_x0(self, log_score: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        """[N, V] the clean token's log-probabilities behind a score, the inverse of `log_score`.

        A score that no distribution has (a network's may be) is read with its negative parts cut
        off.
        """
        q = log_score.double().masked_fill(~self._states, -torch.inf).softmax(-1)
        m, b = self.shares(alpha.double())
        x0 = (q - self._spread(m, b)).clamp(min=0.0) * self.vocabulary.clean
        total = x0.sum(-1, keepdim=True)
        # Where next to nothing survives, the difference may be lost to rounding.
        q = q * self.vocabulary.clean
        return torch.where(total == 0.0, q / q.sum(-1, keepdim=True), x0 / total).log()

    def staggered_score(self, log_score: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """[N, V] exp(-(sigma_t - sigma_s) Q) s: the score taken back from t to s.

        Eq. 20, arXiv:2310.16834, in closed form; times `likelihood` it is the law of x_s.
        """
        score = log_score.double().masked_fill(~self._states, -torch.inf).exp()
        ratio, m, b = self._between(alpha_s.double(), alpha_t.double())
        return (score - score.sum(-1, keepdim=True) * self._spread(m, b)) / ratio[:, None]

    # --- pieces ---

    @property
    def _states(self) -> Tensor:
        """[V] bool: the rows that tokens can be at any time."""
        if not self.has_mask:
            return self.vocabulary.clean
        at = torch.arange(len(self.vocabulary.clean), device=self.vocabulary.clean.device)
        return self.vocabulary.clean | (at == self.mask_token_id)

    def _spread(self, m: Tensor, b: Tensor) -> Tensor:
        """[N, V] m at the mask, b at each clean token."""
        spread = b[:, None] * self.vocabulary.clean
        spread[:, self.mask_token_id] += m
        return spread

    def _between(self, alpha_s: Tensor, alpha_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N] survival from s to t, and the mass that mask and clean tokens get on the way."""
        ratio = torch.where(alpha_t == alpha_s, 1.0, alpha_t / alpha_s)  # also where both are 0
        (m_s, b_s), (m_t, b_t) = self.shares(alpha_s), self.shares(alpha_t)
        # Rounding could make them negative.
        return ratio, (m_t - ratio * m_s).clamp(min=0.0), (b_t - ratio * b_s).clamp(min=0.0)


@dataclass(frozen=True)
class Absorbing(ForwardProcess):
    """Tokens turn into the mask and stay there (Sec. 3.1, arXiv:2406.07524)."""

    name: ClassVar[str] = "absorbing"
    replaces_tokens: ClassVar[bool] = False

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - alpha, torch.zeros_like(alpha)

    def reveal_probability(self, log_x0: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Probability that a masked token is revealed between t and s < t.

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

    `alpha` is the clock's, 1 - t. What a masked position was depends on when it was lost, so
    predictions are p(x_0 | x_t) and posteriors average over them.

    Attributes:
        vocabulary: which rows are clean tokens.
        schedule: the learned schedule, which holds the exponents.
    """

    schedule: Learned

    name: ClassVar[str] = "absorbing by token"
    replaces_tokens: ClassVar[bool] = False
    by_token: ClassVar[bool] = True

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
            raise ValueError("tokens are lost at their own paces: their noise needs to know them")
        return self.token_exponents[x0]

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        # Whatever is built on one survival probability for all tokens ends here.
        raise ValueError("noise by token has no one survival probability: no scores, no transition")

    def log_score(self, log_x0: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        raise ValueError("noise by token has no scores: its tokens do not share an alpha")

    def marginal(self, x0: Tensor, alpha: Tensor) -> Tensor:
        lost = (1.0 - alpha.double())[:, None] ** self.token_exponents * x0.double()
        kept = x0.double() - lost
        kept[:, self.mask_token_id] += lost.sum(-1)
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
        same = functional.one_hot(xt, x0.shape[-1]).double()
        return torch.where((xt == self.mask_token_id)[:, None], back, same)


@dataclass(frozen=True)
class Uniform(ForwardProcess):
    """Tokens turn into uniformly drawn clean ones (Sec. 3.1, arXiv:2310.16834)."""

    name: ClassVar[str] = "uniform"
    has_mask: ClassVar[bool] = False

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), (1.0 - alpha) / self.vocabulary.count


@dataclass(frozen=True)
class Hybrid(ForwardProcess):
    """Masks and uniform tokens at once (Sec. 3.2, arXiv:2503.04482).

    Attributes:
        vocabulary: which rows are clean tokens.
        schedule: the hybrid schedule, which also says how much of the noise is uniform.
    """

    schedule: HybridSchedule

    name: ClassVar[str] = "hybrid"

    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        t = self.schedule.t_of_alpha(alpha)
        c = self.schedule.uniform_mass(t)
        return t / (1.0 + c), c / (1.0 + c) / self.vocabulary.count


PROCESSES: dict[str, type[ForwardProcess]] = {
    "absorbing": Absorbing,
    "uniform": Uniform,
    "hybrid": Hybrid,
}


def build_process(kind: str, vocabulary: Vocabulary, schedule: NoiseSchedule) -> ForwardProcess:
    """The process that a config's `diffusion.process` names.

    Raises:
        ValueError: hybrid noise and its schedule come only together, learned schedules only with
            absorbing noise.
    """
    if (kind == "hybrid") != isinstance(schedule, HybridSchedule):
        raise ValueError("the hybrid process and the hybrid schedule need each other")
    if isinstance(schedule, HybridSchedule):
        return Hybrid(vocabulary, schedule)
    if isinstance(schedule, Learned):
        if kind != "absorbing":
            raise ValueError("learned schedules are defined for absorbing noise only")
        return AbsorbingByToken(vocabulary, schedule)
    return PROCESSES[kind](vocabulary)
