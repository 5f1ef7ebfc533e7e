"""Forward process: how clean tokens are corrupted, and the exact way back.

A token survives until the noise level `alpha` with that probability; otherwise it becomes the mask
or a uniformly drawn clean token. Absorbing, uniform and hybrid noise differ only in how the mass
that did not survive is divided between the two (`shares`). Marginals, transitions, posteriors and
scores follow from it.

States are the V vocabulary rows. `Vocabulary` excludes the ids that are not clean tokens (mask,
padding, rows beyond the tokenizer), so that no objective and no rule gives them probability.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.noise import Noise
    from textdiff.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary that are clean tokens.

    Attributes:
        clean: [V] bool.
        ids: [K] int64, the clean ids in ascending order.
        others: [V - K] int64, the other ids in ascending order.
        mask_token_id: the absorbing state.
    """

    clean: Tensor
    ids: Tensor
    others: Tensor
    mask_token_id: int

    @classmethod
    def of(cls, size: int, mask_token_id: int, excluded: Iterable[int] = ()) -> Vocabulary:
        """Return a vocabulary of `size` rows without the mask and the `excluded` ids."""
        clean = torch.ones(size, dtype=torch.bool)  # [V]
        clean[[mask_token_id, *excluded]] = False
        return cls._listed(clean, mask_token_id)

    @classmethod
    def _listed(cls, clean: Tensor, mask_token_id: int) -> Vocabulary:
        # Listed once: on a device the CPU would wait for the number of ids.
        ids, others = (rows.nonzero().squeeze(1) for rows in (clean, ~clean))
        return cls(clean, ids, others, mask_token_id)

    def among(self, allowed: Tensor) -> Vocabulary:
        """Return the vocabulary without the clean tokens that are not allowed, [V] bool."""
        return self._listed(self.clean & allowed, self.mask_token_id)

    @property
    def count(self) -> int:
        """K, the number of clean tokens."""
        return len(self.ids)

    def to(self, device: torch.device) -> Vocabulary:
        """Return the vocabulary on another device."""
        clean, ids, others = (x.to(device) for x in (self.clean, self.ids, self.others))
        return Vocabulary(clean, ids, others, self.mask_token_id)


def indicator(index: Tensor, rows: int) -> Tensor:
    """Return [N, rows] float64, 1 at an index [N] of each row; torch's own is int64 before."""
    zeros = torch.zeros(len(index), rows, dtype=torch.float64, device=index.device)
    return zeros.scatter_(-1, index[:, None], 1.0)


@dataclass(frozen=True)
class ForwardProcess(ABC):
    """A Markov process on tokens with independent positions; randomness is passed in.

    At survival probability alpha a token x is distributed as

        q(z | x) = alpha [z = x] + m [z is the mask] + b [z is clean],   alpha + m + K b = 1,

    where (m, b) = `shares(alpha)`. Letters: N positions, V rows, K clean tokens; s is earlier
    (cleaner) than t. Results are float64.

    Attributes:
        vocabulary: rows that are clean tokens.
        name: the process in messages and configs.
        has_mask: whether tokens may become the mask.
        replaces_tokens: whether tokens may become other clean tokens, at random.
        by_token: whether some tokens are corrupted at a higher rate than others.
        masks_evenly: whether tokens only become the mask, all at one rate.
    """

    vocabulary: Vocabulary

    name: ClassVar[str]
    has_mask: ClassVar[bool] = True
    replaces_tokens: ClassVar[bool] = True
    by_token: ClassVar[bool] = False
    masks_evenly: ClassVar[bool] = False

    @classmethod
    def under(cls, schedule: NoiseSchedule, vocabulary: Vocabulary) -> ForwardProcess:
        """Return the process under a schedule that fits it."""
        return cls(vocabulary)

    @abstractmethod
    def shares(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mass that did not survive at the mask and at each clean token.

        Both have the shape of `alpha`.
        """

    @property
    def mask_token_id(self) -> int:
        """The absorbing state."""
        return self.vocabulary.mask_token_id

    def to(self, device: torch.device) -> Self:
        """Return the process with its tables on another device."""
        return replace(self, vocabulary=self.vocabulary.to(device))

    # --- forward ---

    def prior(self, shape: tuple[int, ...], u: Tensor | None = None) -> Tensor:
        """Return tokens at alpha = 0, int64 of `shape`.

        Args:
            shape: shape of the result.
            u: uniforms of that shape, for noise that replaces tokens.
        """
        return self.corruptions(torch.zeros((), dtype=torch.float64), u).expand(shape).contiguous()

    def rate_exponents(self, x0: Tensor | None) -> Tensor | None:
        """Return [B, L] exponents of 1 - alpha, or None where all are 1.

        A position is corrupted by the level 1 - alpha with that probability to its exponent.
        """
        return None

    def corrupt(self, x0: Tensor, noise: Noise) -> Tensor:
        """Draw x_t given x_0, both [B, L] int64."""
        return torch.where(noise.corrupted, self.corruptions(noise.alpha, noise.u_token), x0)

    def corruptions(self, alpha: Tensor, u: Tensor | None) -> Tensor:
        """Draw what tokens become that do not survive until alpha, by one uniform each."""
        # Filled on the device: a tensor of the number would be copied there.
        mask = torch.full((), self.mask_token_id, device=self.vocabulary.ids.device)
        if not self.replaces_tokens:
            return mask
        if u is None:
            raise ValueError(f"{self.name} noise replaces tokens and needs uniforms")
        m, b = self.shares(alpha)
        count = self.vocabulary.count
        masked = m / (m + count * b).clamp(min=torch.finfo(torch.float64).tiny)
        index = ((u - masked) / (1.0 - masked) * count).to(torch.int64).clamp(0, count - 1)
        return torch.where(u < masked, mask, self.vocabulary.ids[index])

    def marginal(self, x0: Tensor, alpha: Tensor) -> Tensor:
        """Return q(. | x_0 ~ x0) at one noise level.

        Args:
            x0: [N, V] probabilities of the clean token.
            alpha: [N] survival probability.

        Returns:
            [N, V] probabilities.
        """
        m, b = self.shares(alpha.double())
        return alpha.double()[:, None] * x0.double() + self._spread(m, b)

    def prior_kl(self, alpha: float) -> float:
        """Return KL(q(. | x) || prior), nats per token, where noise ends at `alpha`.

        It may be infinite.
        """
        end = torch.tensor([alpha], dtype=torch.float64)
        one = torch.nn.functional.one_hot(self.vocabulary.ids[:1].cpu(), len(self.vocabulary.clean))
        on_cpu = self.to(torch.device("cpu"))
        q, p = on_cpu.marginal(one, end), on_cpu.marginal(one, torch.zeros_like(end))
        return float(torch.where(q > 0.0, q * (q / p).log(), 0.0).sum())

    # --- backward ---

    def likelihood(self, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Return [N, V] q(x_t | x_s = y) for every state y, at x_t [N].

        It is a row of the exponential of the integrated rate matrix, in closed form. For absorbing
        and uniform noise it is a row of exp((sigma_t - sigma_s) Q) with Q = target 1^T - I (Sec.
        3.1, arXiv:2310.16834).
        """
        ratio, m, b = self._between(alpha_s.double(), alpha_t.double())
        arrived = torch.where(xt == self.mask_token_id, m, b)
        rows = arrived[:, None].expand(-1, len(self.vocabulary.clean))  # [N, V]
        return rows.scatter_add(-1, xt[:, None], ratio[:, None]) * self._states

    def posterior(
        self,
        log_x0: Tensor,
        xt: Tensor,
        alpha_s: Tensor,
        alpha_t: Tensor,
        mixture: bool = False,
    ) -> Tensor:
        """Return q(x_s | x_t, x_0 ~ exp(log_x0)) by Bayes' rule.

        Args:
            log_x0: [N, V] log-probabilities of the clean token.
            xt: [N] current tokens.
            alpha_s: [N] survival probability at the earlier time.
            alpha_t: [N] survival probability now, alpha_t <= alpha_s.
            mixture: read log_x0 as p(x_0 | x_t) and average the posteriors of single tokens (Eq. 4,
                arXiv:2107.03006); else as a distribution that is plugged into the formula (Eq. 16,
                arXiv:2406.07524).

        Returns:
            [N, V] probabilities. Where noise cannot make a token, a visible one stays what it is.
        """
        x0 = log_x0.double().exp()
        alpha_s, alpha_t = alpha_s.double(), alpha_t.double()
        back = self._mixed(x0, xt, alpha_s, alpha_t) if mixture else self.marginal(x0, alpha_s)
        back = back * self.likelihood(xt, alpha_s, alpha_t)
        total = back.sum(-1, keepdim=True)
        stay = indicator(xt, log_x0.shape[-1])
        # Without noise only what is predicted at x_t itself counts, and it may have underflowed.
        back = torch.where(total == 0.0, stay, back / total)
        if self.replaces_tokens:
            return back
        return torch.where((xt == self.mask_token_id)[:, None], back, stay)

    def _mixed(self, x0: Tensor, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Sum x0(w) q(. | w) at s over w, each divided by q(x_t | w)."""
        m, b = self.shares(alpha_t)
        arrived = torch.where(xt == self.mask_token_id, m, b)
        same = indicator(xt, x0.shape[-1])
        chance = alpha_t[:, None] * same + arrived[:, None]  # of x_t, by clean token
        odds = (x0 / chance).where((x0 > 0.0) & (chance > 0.0), 0.0)
        m, b = self.shares(alpha_s)
        return alpha_s[:, None] * odds + odds.sum(-1, keepdim=True) * self._spread(m, b)

    # --- scores ---

    def log_score(self, log_x0: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        """Return [N, V] log q(y) - log q(x_t) at one noise level, of x_0 ~ exp(log_x0)."""
        q = self.marginal(log_x0.double().exp(), alpha).log()
        return q - q.gather(-1, xt[:, None])

    def log_x0(self, log_score: Tensor, xt: Tensor, alpha: Tensor) -> Tensor:
        """Return [N, V] log-probabilities of the clean token for a score: inverts `log_score`.

        A network's score may be that of no distribution; negative probabilities count as 0.
        """
        q = log_score.double().masked_fill(~self._states, -torch.inf).softmax(-1)
        m, b = self.shares(alpha.double())
        x0 = (q - self._spread(m, b)).clamp(min=0.0) * self.vocabulary.clean
        total = x0.sum(-1, keepdim=True)
        # Where next to nothing survives, the difference may be lost to rounding.
        q = q * self.vocabulary.clean
        return torch.where(total == 0.0, q / q.sum(-1, keepdim=True), x0 / total).log()

    def staggered_score(self, log_score: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        """Return [N, V] exp(-(sigma_t - sigma_s) Q) s, the score taken back from t to s.

        Eq. 20, arXiv:2310.16834, in closed form; times `likelihood` it is the distribution of x_s.
        """
        score = log_score.double().masked_fill(~self._states, -torch.inf).exp()
        ratio, m, b = self._between(alpha_s.double(), alpha_t.double())
        return (score - score.sum(-1, keepdim=True) * self._spread(m, b)) / ratio[:, None]

    # --- pieces ---

    @property
    def _states(self) -> Tensor:
        """[V] bool: rows that tokens may be at any time."""
        if not self.has_mask:
            return self.vocabulary.clean
        at = torch.arange(len(self.vocabulary.clean), device=self.vocabulary.clean.device)
        return self.vocabulary.clean | (at == self.mask_token_id)

    def _spread(self, m: Tensor, b: Tensor) -> Tensor:
        """Return [N, V] m at the mask and b at each clean token."""
        spread = b[:, None] * self.vocabulary.clean
        spread[:, self.mask_token_id] += m
        return spread

    def _between(self, alpha_s: Tensor, alpha_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return [N] survival from s to t, and the mass that mask and clean tokens gain."""
        ratio = torch.where(alpha_t == alpha_s, 1.0, alpha_t / alpha_s)  # also where both are 0
        (m_s, b_s), (m_t, b_t) = self.shares(alpha_s), self.shares(alpha_t)
        # Rounding could make them negative.
        return ratio, (m_t - ratio * m_s).clamp(min=0.0), (b_t - ratio * b_s).clamp(min=0.0)
