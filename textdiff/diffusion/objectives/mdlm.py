"""Masked diffusion with the SUBS parameterisation (Sec. 3.2, arXiv:2406.07524).

The mask never has probability and visible tokens are carried over, so the bound is weighted
cross-entropy at masked positions: -alpha' / (1 - alpha) by time, n / k by count (arXiv:2406.03736),
T (alpha_s - alpha_t) / (1 - alpha_t) in T steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field, model_validator

from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives.objective import Objective, Prediction, clean_log_softmax, pick
from textdiff.diffusion.process import ForwardProcess
from textdiff.diffusion.processes import AbsorbingByToken
from textdiff.section import Tensor, Whole

if TYPE_CHECKING:
    from textdiff.diffusion import DiffusionConfig


CLIP = 2.0
"""Largest weight with `loss_weight: clipped`; plain cross-entropy has it everywhere."""


class _MaskedCrossEntropy(Objective):
    """Weighted cross-entropy at masked positions."""

    processes = ("absorbing",)
    in_steps = True
    heavy_tailed = False

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        return -(noise.weight * pick(prediction.log_x0, x0))


class MDLM(_MaskedCrossEntropy):
    """Masked diffusion with the SUBS parameterisation (arXiv:2406.07524).

    With `ce` every masked token counts alike, whatever the mask rate. The reported bound is the
    same with all weights.
    """

    kind: Literal["mdlm"] = "mdlm"
    loss_weight: Literal["elbo", "ce", "clipped"] = Field(
        "elbo",
        description="training weights: the bound's own, plain cross-entropy, or the bound's own up "
        "to 2",
    )

    reason = "cross-entropy at masked positions needs masks; udlm, sedd and d3pm do without"
    learns_schedules = True

    @property
    def trains_on_bound(self) -> bool:
        return self.loss_weight == "elbo"

    def _implementation(self, process: ForwardProcess) -> type[Objective]:
        return GenMD4 if process.by_token else MDLM

    def loss_terms(
        self, nelbo: Tensor, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise
    ) -> Tensor:
        if self.loss_weight == "ce":
            # Two, because half the tokens are masked on average: the loss stays in nats per token.
            return nelbo * (CLIP / noise.weight)
        if self.loss_weight == "clipped":
            return nelbo * (CLIP / noise.weight).clamp(max=1.0)
        return nelbo


class GenMD4(MDLM):
    """Masked diffusion with a learned exponent per token (GenMD4, Sec. 6, arXiv:2406.04329).

    A masked token v is revealed between t and s = t - h with probability 1 - (s / t) ** w_v. That
    is h w_v / t to first order. The model reveals v with c(v) times that. The divergence of its
    reverse transition from the true one is, per unit of time (Eq. 12 there),

        (1 / t) (-w_x (ln c(x) + 1) + sum_v w_v c(v)).

    No term is missing at the ends: at t = 0 every token is visible, at t = 1 none is. Where all w
    are equal it is (w / t) times cross-entropy. The best c is p(x_0 = v | x_t), which depends on t.
    """

    in_steps = False

    def predict(self, logits: Tensor, xt: Tensor, alpha: Tensor) -> Prediction:
        return Prediction(clean_log_softmax(logits, self.vocabulary), mixture=True)

    def nelbo_terms(self, prediction: Prediction, x0: Tensor, xt: Tensor, noise: Noise) -> Tensor:
        exponents = cast("AbsorbingByToken", self.process).token_exponents  # [V]
        exponent, c = exponents[x0], prediction.log_x0.exp()
        # No matrix product: autocast would round it. And w_x times the sum of c, which is 1 only to
        # rounding, so that equal exponents cancel.
        total = (c * exponents.to(c.dtype)).sum(-1, dtype=exponents.dtype)
        total = total - exponent * c.sum(-1, dtype=exponents.dtype)
        return noise.weight * (total - exponent * pick(prediction.log_x0, x0))


class AR(_MaskedCrossEntropy):
    """Left to right: blocks of one token and a causal network.

    The network reads tokens shifted right. A block of one token is always masked, with weight 1:
    its bound is its likelihood, exactly. Where `start` is set and the first token of a text is not
    scored, nothing precedes it, as in published evaluations.
    """

    kind: Literal["ar"] = "ar"
    start: Whole | None = Field(
        None, ge=0, description="id that texts begin with in the network's input; null: the mask"
    )

    reason = "it predicts one wholly masked token after the other"
    shifted = True

    @property
    def first_input(self) -> int:
        return self.vocabulary.mask_token_id if self.start is None else self.start

    @property
    def has_own_start(self) -> bool:
        return self.start is not None

    @model_validator(mode="after")
    def _left_to_right(self) -> AR:
        if self.shift or self.ar_weight:
            raise ValueError(
                "objective ar predicts the next token by itself: set shift: false and ar_weight: 0 "
                "(they are for objectives that fill masks)"
            )
        return self

    def refusal(self, choices: DiffusionConfig) -> str | None:
        problem = super().refusal(choices)
        if problem:
            return problem
        if choices.timesteps is not None:
            return "objective ar is in continuous time: set timesteps: null"
        if choices.block_size != 1:
            return "objective ar predicts token after token: set block_size: 1"
        if choices.noise.draw != "count" or choices.noise.range != (0.0, 1.0):
            return "objective ar masks every token: set noise.draw: count, noise.range: [0.0, 1.0]"
        return None
