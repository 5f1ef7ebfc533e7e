"""Uniform and hybrid noise in continuous time with the clean token's distribution plugged in.

Let q(j) = alpha x(j) + b on the K clean tokens, x being either one token (x0) or the network's
distribution. Then the bounds are made of two divergences: Kullback-Leibler, and Itakura-Saito at
the current token. Since one of the two distributions is constant but for one entry, the sum over
the vocabulary needs the network's alone: no one-hot row is built (the closed form of
arXiv:2506.10892, App. B). The optimum is the posterior of a token given the *other* tokens of x_t,
not x_t itself.
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.mdlm import CLIP
from textdiff.diffusion.objectives.objective import Objective, Prediction, pick
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.processes import Hybrid
from textdiff.diffusion.schedule import HybridSchedule
from textdiff.section import Tensor, torch

_LEAST = 1e-30  # its inverse fits float32


def divergences(
    log_x0: Tensor, x0: Tensor, xt: Tensor, alpha: Tensor, b: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return KL(q(. | x0) || q(. | log_x0)) and the Itakura-Saito divergence at x_t.

    Args:
        log_x0: [N, V] the network's log-probabilities.
        x0: [N] clean tokens.
        xt: [N] current tokens; where one is the mask, the second divergence is 0.
        alpha: [N] survival probability.
        b: [N] mass that noise gives each clean token.
        vocabulary: rows that are clean tokens.

    Returns:
        [N] nats and [N] r - 1 - ln r, with r = q(x_t | x0) / q(x_t | log_x0) (Eq. 11,
        arXiv:2503.04482).
    """
    # All of it relative to b: logs of q itself would cancel where little or nothing survives. Where
    # everything survives, b is 0 and what follows is its limit.
    b = b.clamp(min=_LEAST)
    ratio = alpha / b
    logs = torch.log1p(log_x0.exp() * ratio[:, None].to(log_x0.dtype)).sum(-1).double()
    zero = torch.zeros_like(ratio)
    at_x0 = torch.logaddexp(ratio.log() + pick(log_x0, x0), zero)
    kl = (alpha + b) * torch.log1p(ratio) - b * logs - alpha * at_x0
    at_xt = torch.logaddexp(ratio.log() + pick(log_x0, xt), zero)
    log_r = torch.where(xt == x0, torch.log1p(ratio), 0.0) - at_xt
    log_r = log_r.where(vocabulary.clean[xt], 0.0)
    return kl, torch.expm1(log_r) - log_r


class UDLM(Objective):
    """Uniform noise in continuous time (arXiv:2412.10193).

    The rate of the bound (Eq. 18 there) is lambda / (alpha K q(x_t | x0)) times the divergences,
    per unit of the masked bound's weight. It equals the score entropy of the score that the
    plugged-in distribution has.
    """

    kind: Literal["udlm"] = "udlm"

    processes = ("uniform",)
    reason = "its bound is that of uniform noise; mdlm is the masked one"
    scores_all_positions = True

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        alpha, replaced = noise.alpha, 1.0 - noise.alpha
        b = replaced / self.vocabulary.count
        kl, itakura_saito = divergences(prediction.log_x0, x0, xt, alpha, b, self.vocabulary)
        q = torch.where(xt == x0, alpha + b, b)
        rate = replaced / (alpha * self.vocabulary.count * q)
        return noise.weight * rate * (kl + itakura_saito)


class GIDD(Objective):
    """Masks and uniform noise at once (arXiv:2503.04482).

    The bound (Eq. 11 there) weights the divergences by the token at the position: the mask, the
    clean token, or another token. `clipped` clips its rate per unit of time at 2. `dynamic` gives
    masks 2, uniform tokens 1 and clean ones B / K times sqrt(t / (1 - t)) (Sec. 3.4). `released`
    is the authors' code, by which the published models were trained: clean ones have B / (K + 1)
    times exp(sigmoid(-t) / 2). The reported bound is the same.
    """

    kind: Literal["gidd"] = "gidd"
    loss_weight: Literal["elbo", "clipped", "dynamic", "released"] = Field(
        "elbo",
        description="training weights: the bound's own, up to 2, or by kind of token, as in the "
        "paper or in its code",
    )

    processes = ("hybrid",)
    reason = "its bound is that of masks and uniform noise at once"
    scores_all_positions = True

    @property
    def trains_on_bound(self) -> bool:
        return self.loss_weight == "elbo"

    @property
    def schedule(self) -> HybridSchedule:
        """The schedule of the hybrid process."""
        return cast("Hybrid", self.process).schedule

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        _, b = self.process.shares(noise.alpha)
        kl, itakura_saito = divergences(prediction.log_x0, x0, xt, noise.alpha, b, self.vocabulary)
        time = self.schedule.t_of_alpha(noise.alpha)
        per_weight = 1.0 / self.schedule.elbo_weight(time)
        return noise.weight * per_weight * self.rate(x0, xt, time) * (kl + itakura_saito)

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        if self.loss_weight == "elbo":
            return nelbo
        time = self.schedule.t_of_alpha(noise.alpha)
        rate = self.rate(x0, xt, time)
        clipped = self.loss_weight == "clipped"
        wanted = rate.clamp(max=CLIP) if clipped else self._dynamic(x0, xt, time)
        return nelbo * (wanted / rate)

    def rate(self, x0: Tensor, xt: Tensor, time: Tensor) -> Tensor:
        """Return the [N] weight of the divergences per unit of time."""
        schedule, count = self.schedule, self.vocabulary.count
        c, left = schedule.uniform_mass(time), 1.0 - time
        gain = c + left * schedule.uniform_mass_slope(time)
        masked = 1.0 / (time * left)
        clean = gain / count / (left * (left + c / count))
        other = gain / (left * c)
        rate = torch.where(xt == x0, clean, other)
        return torch.where(xt == self.vocabulary.mask_token_id, masked, rate)

    def _dynamic(self, x0: Tensor, xt: Tensor, time: Tensor) -> Tensor:
        """Return [N] weights by kind of token; log-SNR is logit(1 - t)."""
        scale, count = self.schedule.scale, self.vocabulary.count
        if self.loss_weight == "released":
            clean = scale / (count + 1) * (0.5 * torch.sigmoid(-time)).exp()
        else:
            clean = scale / count * (time / (1.0 - time)).sqrt()
        weight = torch.where(xt == x0, clean, 1.0)
        return torch.where(xt == self.vocabulary.mask_token_id, 2.0, weight)
