"""Remasking (ReMDM): revealed tokens may be masked again, and drawn anew (arXiv:2503.00307).

From t to s a revealed token is masked with probability sigma. A masked one is revealed with
(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that as many are masked at s as without (Sec. 3
there). The `remasking` strategies choose sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t):

    cap      min(eta, sigma_max)
    rescale  eta sigma_max
    conf     sigma_max shared out among a row's revealed tokens by softmax(-probability when
             revealed); none at masks, so that a few more stay masked than without
    loop     first plain steps down to `alpha_on`, from t = 1 to `t_on`; then sigma = eta at that
             alpha until `t_off`; then plain steps to the end

Which positions change at which step does not depend on the predictions, except for `conf` on
earlier ones. So a call is made for rows only at steps that reveal something in them, or may do so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from textdiff.sampling.rules.mask_tables import MaskTables
from textdiff.sampling.rules.redrawing import even_times
from textdiff.sampling.rules.rule import Rule
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}
"""Each strategy's published eta; `conf` has none."""


class Remask(Rule):
    """Reveals as many positions as `ancestral`, and masks some again."""

    kind: Literal["remask"] = "remask"
    remasking: Literal["cap", "rescale", "conf", "loop"] = Field("cap", description="strategy")
    eta: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="how much is masked again; none is the published value: "
        + ", ".join(f"{value:g} ({name})" for name, value in ETA.items()),
    )
    t_on: float = Field(0.55, gt=0.0, lt=1.0, description="time at which `loop` starts to")
    t_off: float = Field(
        0.05, gt=0.0, lt=1.0, description="time at which `loop` stops, less than `t_on`"
    )
    alpha_on: float = Field(0.9, gt=0.0, lt=1.0, description="share of revealed tokens meanwhile")

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    task: ClassVar[str] = "masks tokens again at one rate for all of them"
    reveals_ahead: ClassVar[bool] = True
    chance: ClassVar[str] = "masks tokens again that chance chooses"
    revises: ClassVar[bool] = True

    @model_validator(mode="after")
    def _in_order(self) -> Remask:
        if self.t_off >= self.t_on:
            raise ValueError(f"t_off {self.t_off} must be less than t_on {self.t_on}")
        return self

    def __call__(self, segment: Segment) -> Iterator[Step]:
        schedule, every = segment.schedule, segment.where(~segment.frozen)
        alphas = self.alphas(schedule, even_times(segment.steps))
        by_belief = self.remasking == "conf"  # else all is known before the first call
        masks = MaskTables(segment, ahead=by_belief and segment.ahead)
        belief = torch.zeros_like(masks.masked, dtype=torch.float64)
        for index in range(segment.steps):
            alpha_t, alpha_s = alphas[index], alphas[index + 1]
            sigma = self.sigma(alpha_t, alpha_s, belief, masks.revealed)
            u = segment.position_uniforms(index)
            at_masks = torch.zeros_like(alpha_t) if by_belief else sigma
            reveal = u < reveal_chance(alpha_t, alpha_s, at_masks)
            positions = masks.begin(reveal, masks.decided(u) < sigma)
            if len(positions):
                t = schedule.t_of_alpha(alpha_t).clamp(0.0, 1.0).expand(len(u))
                prediction = segment.predict(positions, t)
                tokens = segment.draw(positions, prediction, t, index)
                which = masks.put(positions, tokens)
                if by_belief:
                    chances = masks.decided(segment.log_chances(prediction, tokens).exp())
                    belief = positions.replaced(belief, chances, which)
            most = sigma_max(alpha_t, alpha_s)
            may = u < most * largest_share(masks.certain) if masks.ahead else None
            if masks.end(may):
                again = masks.remasked()
                changed = every.entries(masks.reveal | again)
                yield segment.step(every, t, moved=changed, again=every.entries(again))

    def alphas(self, schedule: NoiseSchedule, times: Tensor) -> Tensor:
        """Return [T + 1] the intended share of revealed tokens, exactly 1 at the end."""
        if self.remasking == "loop":
            rising = self.alpha_on * (1.0 - times) / (1.0 - self.t_on)
            ending = 1.0 - (1.0 - self.alpha_on) * times / self.t_off
            alphas = torch.maximum(rising.clamp(max=self.alpha_on), ending)
        else:
            alphas = schedule.alpha(times)
        alphas[-1] = 1.0
        return alphas

    def sigma(self, alpha_t: Tensor, alpha_s: Tensor, belief: Tensor, revealed: Tensor) -> Tensor:
        """Return the chance of a revealed token to be masked again, a scalar or [R, L].

        Args:
            alpha_t: scalar, before the step.
            alpha_s: scalar, after it.
            belief: [R, L] probability that each token had when it was revealed.
            revealed: [R, L] bool, tokens that may be masked again.
        """
        eta = ETA[self.remasking] if self.eta is None else self.eta
        most = sigma_max(alpha_t, alpha_s)
        if self.remasking == "cap":
            return most.clamp(max=eta)
        if self.remasking == "rescale":
            return eta * most
        if self.remasking == "conf":
            share = (-belief).masked_fill(~revealed, -torch.inf).softmax(1)
            return most * share.where(revealed, 0.0)
        return most.clamp(max=eta) if alpha_t == alpha_s else torch.zeros_like(most)


def sigma_max(alpha_t: Tensor, alpha_s: Tensor) -> Tensor:
    """Return the largest chance of a revealed token to be masked again."""
    return ((1.0 - alpha_s) / alpha_t.clamp(min=1e-300)).clamp(max=1.0)


def largest_share(revealed: Tensor) -> Tensor:
    """Return the most of sigma_max that `conf` may give to a token, [R, 1].

    That is e / (e + n - 1) of n: the weight exp(-probability) of each is from 1 / e to 1.

    Args:
        revealed: [R, S] bool, n of each row that are revealed; there may be more.
    """
    others = (revealed.sum(1, keepdim=True) - 1).clamp(min=0)
    return (math.e / (math.e + others)) * 1.001  # probabilities are rounded


def reveal_chance(alpha_t: Tensor, alpha_s: Tensor, sigma: Tensor) -> Tensor:
    """Return the chance of a masked token to be revealed, of sigma's shape."""
    return (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
