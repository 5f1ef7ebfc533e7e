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
earlier ones. So a call is made for rows only at steps that reveal something in them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

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
        is_open = ~segment.frozen
        masked, remasked = is_open, torch.zeros_like(is_open)
        belief = torch.zeros_like(is_open, dtype=torch.float64)
        for index in range(segment.steps):
            alpha_t, alpha_s = alphas[index], alphas[index + 1]
            sigma = self.sigma(alpha_t, alpha_s, belief, ~masked & is_open)
            u = segment.position_uniforms(index)
            reveal = masked & (u < reveal_chance(alpha_t, alpha_s, sigma))
            again = ~masked & is_open & (u < sigma)
            masked, remasked = (masked | again) & ~reveal, (remasked | again) & ~reveal
            positions = segment.where(reveal)
            if len(positions):
                t = schedule.t_of_alpha(alpha_t).clamp(0.0, 1.0).expand(len(is_open))
                prediction = segment.predict(positions, t)
                tokens = segment.draw(positions, prediction, t, index)
                if self.remasking == "conf":  # the others do not wait for the device
                    chances = segment.log_chances(prediction, tokens).exp().cpu()
                    belief = positions.replaced(belief, chances)
                segment.put(positions, tokens)
            segment.mask(again)
            if len(positions):
                changed = every.entries(reveal | remasked)
                yield segment.step(every, t, moved=changed, again=every.entries(remasked))
                remasked = torch.zeros_like(remasked)

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
        most = ((1.0 - alpha_s) / alpha_t.clamp(min=1e-300)).clamp(max=1.0)
        if self.remasking == "cap":
            return most.clamp(max=eta)
        if self.remasking == "rescale":
            return eta * most
        if self.remasking == "conf":
            share = (-belief).masked_fill(~revealed, -torch.inf).softmax(1)
            return most * share.where(revealed, 0.0)
        return most.clamp(max=eta) if alpha_t == alpha_s else torch.zeros_like(most)


def reveal_chance(alpha_t: Tensor, alpha_s: Tensor, sigma: Tensor) -> Tensor:
    """Return the chance of a masked token to be revealed, of sigma's shape."""
    return (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
