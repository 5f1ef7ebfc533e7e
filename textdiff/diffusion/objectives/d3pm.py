"""Diffusion in T steps: the Kullback-Leibler divergence of exact posteriors (arXiv:2107.03006).

Each of the steps i = 1..T contributes KL(q(x_s | x_t, x_0) || p(x_s | x_t)) with t = i / T and
s = (i - 1) / T. That of the first is the reconstruction. p averages the posteriors of single clean
tokens over the network's p(x_0 | x_t) (`mixture`, Eq. 4 there). Or it plugs that distribution into
the posterior's formula (`plugged`, Eq. 16 of arXiv:2406.07524).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.objective import (
    Objective,
    Prediction,
    clean_log_softmax,
    pick,
    wide,
)
from textdiff.diffusion.process import ForwardProcess, Vocabulary
from textdiff.section import Number, Tensor, torch


class D3PM(Objective):
    """Diffusion in T steps with exact posteriors (arXiv:2107.03006).

    Under absorbing noise `mixture` never predicts the mask, and the divergence is weighted
    cross-entropy. `plugged` lets the network put mass on the mask, as published baselines do.
    Sampling then leaves a mask masked with the probability that the bound counts.
    """

    kind: Literal["d3pm"] = "d3pm"
    parameterization: Literal["mixture", "plugged"] = Field(
        "mixture",
        description="average posteriors over the predicted token, or plug its distribution in",
    )
    # Eq. 5, arXiv:2107.03006; 0.01 there for some models. The bound never has it.
    auxiliary: Number = Field(
        0.0, ge=0.0, description="weight of the cross-entropy that training adds"
    )

    processes = ("absorbing", "uniform")
    reason = "its posteriors are written for noise of one kind; gidd takes both"
    in_steps = True
    in_continuous_time = False

    def _implementation(self, process: ForwardProcess) -> type[Objective]:
        return D3PMUniform if process.replaces_tokens else D3PMAbsorbing

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        if not self.auxiliary:
            return nelbo
        loss: Tensor = nelbo - self.auxiliary * pick(prediction.log_x0, x0)
        return loss

    @staticmethod
    def steps(noise: Noise, alpha_s: Tensor) -> Tensor:
        """Return [N] T, from the masked bound's weight."""
        steps: Tensor = noise.weight * (1.0 - noise.alpha) / (alpha_s - noise.alpha)
        return steps


class D3PMAbsorbing(D3PM):
    """T steps of absorbing noise; only masked positions contribute."""

    heavy_tailed = False

    @property
    def predicts_mask(self) -> bool:
        return self.parameterization == "plugged"

    @property
    def outputs(self) -> Tensor:
        if not self.predicts_mask:
            return self.vocabulary.clean
        read = self.vocabulary.clean.clone()
        read[self.vocabulary.mask_token_id] = True
        return read

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        if self.parameterization == "mixture":
            return Prediction(clean_log_softmax(logits, self.vocabulary))
        raw = wide(logits).masked_fill(~self.outputs, -torch.inf).log_softmax(-1)
        return Prediction(lambda: clean_log_softmax(logits, self.vocabulary), log_state=raw)

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        if prediction.log_state is None:
            return -(noise.weight * pick(prediction.log_x0, x0))
        assert noise.alpha_s is not None
        # q reveals x0 with probability `reveal`, else it stays; p does so with reveal * x(x0) and
        # (stay + alpha_s x(m)) (all over 1 - alpha + alpha x(m)).
        raw, alpha, alpha_s = prediction.log_state, noise.alpha, noise.alpha_s
        mask = torch.full_like(x0, self.vocabulary.mask_token_id)
        masked, masked_s, at_mask = 1.0 - alpha, 1.0 - alpha_s, pick(raw, mask).exp()
        reveal = (alpha_s - alpha) / masked
        norm = torch.log1p(alpha * at_mask / masked)
        # At the first step nothing stays masked; dividing by 0 there would spoil the gradient.
        stays = torch.log1p(alpha_s * at_mask / masked_s.where(masked_s > 0.0, 1.0))
        kl = reveal * (norm - pick(raw, x0)) + (1.0 - reveal) * (norm - stays)
        return self.steps(noise, alpha_s) * kl


class D3PMUniform(D3PM):
    """T steps of uniform noise; every position contributes."""

    scores_all_positions = True

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        log_x0 = clean_log_softmax(logits, self.vocabulary)
        return Prediction(log_x0, mixture=self.parameterization == "mixture")

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        """Return the KL over the vocabulary in closed form: q has three distinct values.

        q(y) and p(y) share the factor q(x_t | x_s = y), so their ratio is that of what remains:
        alpha_s [y = x0] + b_s over its norm, and `inner` over its own.
        """
        assert noise.alpha_s is not None
        alpha, alpha_s, count = noise.alpha, noise.alpha_s, self.vocabulary.count
        b, b_s = (1.0 - alpha) / count, (1.0 - alpha_s) / count
        ratio = alpha / alpha_s
        arrive = b - ratio * b_s  # q(x_t | x_s) elsewhere than at x_t
        inner, norm, at_x0 = self._inner(prediction, x0, xt, noise)
        # True posterior times its norm: `arrive` b_s everywhere, more at x_t and at x0.
        true_norm = torch.where(xt == x0, alpha + b, b)
        at_xt = pick(inner, xt).clamp(min=torch.finfo(inner.dtype).tiny).log()
        same = (xt == x0).double()
        cross = arrive * b_s * sum_of_logs(inner, self.vocabulary) + ratio * b_s * at_xt
        cross = cross + (arrive + ratio * same) * alpha_s * at_x0
        other = torch.special.xlogy(b_s, b_s)
        top = (alpha_s + b_s) * (alpha_s + b_s).log() - other
        entropy = arrive * (count * other + top) + ratio * torch.where(xt == x0, top + other, other)
        kl: Tensor = (entropy - cross) / true_norm + norm.log() - true_norm.log()
        return self.steps(noise, alpha_s) * kl

    def _inner(
        self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return [N, V] p(x_s = y) over q(x_t | y), unnormalised, [N] its norm and log at x0.

        The log at x0 is taken before anything can underflow: at the first step it is the whole
        term.
        """
        assert noise.alpha_s is not None
        alpha, alpha_s = noise.alpha, noise.alpha_s
        b, b_s = ((1.0 - a) / self.vocabulary.count for a in (alpha, alpha_s))
        p = prediction.log_x0.exp()
        dtype, log_p = p.dtype, pick(prediction.log_x0, x0)
        if not prediction.mixture:
            inner = torch.addcmul(b_s[:, None].to(dtype), p, alpha_s[:, None].to(dtype))
            at_x0 = torch.logaddexp(alpha_s.log() + log_p, b_s.log())
            return inner, alpha * pick(p, xt) + b, at_x0
        # Times b, so that nothing is divided by a small number; the norm is b then.
        kept, shrink = pick(p, xt), b / (alpha + b)
        base = b_s * (1.0 - kept + kept * shrink)
        inner = torch.addcmul(base[:, None].to(dtype), p, alpha_s[:, None].to(dtype))
        at_xt = alpha_s * kept * shrink + base
        inner = inner.scatter(-1, xt[:, None], at_xt[:, None].to(dtype))
        shrunk = torch.where(xt == x0, shrink, 1.0)
        # The log of 0 would have no gradient; it is 0 at the first step.
        log_base = base.where(base > 0.0, 1.0).log().masked_fill(base <= 0.0, -torch.inf)
        return inner, b, torch.logaddexp((alpha_s * shrunk).log() + log_p, log_base)


def sum_of_logs(values: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return [N] float64, the sum of log over the clean columns of values [N, V]."""
    tiny = torch.finfo(values.dtype).tiny
    logs = values.clamp(min=tiny).log()
    return logs.sum(-1).double() - logs[:, vocabulary.others].sum(-1).double()
