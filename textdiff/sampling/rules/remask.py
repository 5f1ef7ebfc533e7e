"""Remasking (ReMDM): revealed tokens may be masked again, and so be mended (arXiv:2503.00307).

From t to s a revealed token is masked with probability sigma, and a masked one is revealed with
(alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), so that as many are masked at s as without (Sec. 3
there). The `remasking` strategies choose sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t):

    cap      min(eta, sigma_max)
    rescale  eta sigma_max
    conf     sigma_max shared out among a row's revealed tokens by softmax(-probability when
             revealed); none at masks, so that a few more stay masked than without
    loop     first plain steps down to `alpha_on`, from t = 1 to `t_on`; then sigma = eta at that
             alpha until `t_off`; then plain steps to the end

Which positions change at which step does not depend on what the network says, but for `conf` on
what it said before; so a call is made for rows only at steps that reveal something in them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.errors import ConfigError
from textdiff.sampling.rules.knobs import check_choice, check_number
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.segment import Segment, Step

ETA = {"cap": 0.008, "rescale": 0.015, "conf": 1.0, "loop": 0.02}
"""Each strategy's published eta; `conf` has none."""


@dataclass(frozen=True)
class Remask(Rule):
    """Fills the open positions in at most `steps` calls, some of them several times.

    Attributes:
        remasking: `cap`, `rescale`, `conf` or `loop`.
        eta: how much is masked again; None: as published for the strategy.
        t_on: time at which `loop` starts to.
        t_off: time at which it stops.
        alpha_on: its share of revealed tokens in between.
    """

    remasking: str = "cap"
    eta: float | None = None
    t_on: float = 0.55
    t_off: float = 0.05
    alpha_on: float = 0.9

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    otherwise: ClassVar[str] = "masks tokens again at one rate for all of them"
    reveals_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("remasking", self.remasking, ETA)
        if self.eta is not None:
            check_number("eta", self.eta, 0.0, 1.0)
        check_number("t_on", self.t_on, 0.0, 1.0)
        check_number("t_off", self.t_off, 0.0, 1.0)
        check_number("alpha_on", self.alpha_on, 0.0, 1.0)
        if not 0.0 < self.t_off < self.t_on < 1.0 or not 0.0 < self.alpha_on < 1.0:
            raise ConfigError(
                f"t_off {self.t_off}, t_on {self.t_on}, alpha_on {self.alpha_on}: give "
                "0 < t_off < t_on < 1 and an alpha_on between 0 and 1"
            )

    def __call__(self, segment: Segment) -> Iterator[Step]:
        schedule, frozen = segment.schedule, segment.frozen
        times = torch.linspace(1.0, 0.0, segment.steps + 1, dtype=torch.float64)
        alphas = self.alphas(schedule, times)
        masked, remasked = ~frozen, torch.zeros_like(frozen)
        belief = torch.zeros(frozen.shape, dtype=torch.float64)
        for index in range(segment.steps):
            alpha_t, alpha_s = alphas[index], alphas[index + 1]
            sigma = self.sigma(alpha_t, alpha_s, belief, ~masked & ~frozen)
            u = segment.uniforms(Stream.POSITION, index)
            reveal = masked & (u < reveal_chance(alpha_t, alpha_s, sigma))
            again = ~masked & ~frozen & (u < sigma)
            masked, remasked = (masked | again) & ~reveal, (remasked | again) & ~reveal
            positions = reveal.flatten().nonzero().squeeze(1)
            if len(positions):
                t = schedule.t_of_alpha(alpha_t).clamp(0.0, 1.0).expand(len(frozen))
                log_x0 = segment.predict(positions, t).log_x0
                tokens = segment.draw(positions, log_x0, t, index)
                belief[reveal] = log_x0.gather(-1, tokens[:, None])[:, 0].double().exp().cpu()
                segment.put(positions, tokens)
            mask = segment.process.mask_token_id
            segment.canvas = segment.canvas.masked_fill(again.to(segment.canvas.device), mask)
            if len(positions):
                changed = (reveal | remasked).flatten().nonzero().squeeze(1)
                lost = remasked.flatten().nonzero().squeeze(1)
                remasked = torch.zeros_like(remasked)
                yield segment.step(changed, t, remasked=lost)

    def alphas(self, schedule: NoiseSchedule, times: Tensor) -> Tensor:
        """[T + 1] share of revealed tokens that the walk aims at, exactly 1 at the end."""
        if self.remasking == "loop":
            rising = self.alpha_on * (1.0 - times) / (1.0 - self.t_on)
            ending = 1.0 - (1.0 - self.alpha_on) * times / self.t_off
            alphas = torch.maximum(rising.clamp(max=self.alpha_on), ending)
        else:
            alphas = schedule.alpha(times)
        alphas[-1] = 1.0
        return alphas

    def sigma(self, alpha_t: Tensor, alpha_s: Tensor, belief: Tensor, revealed: Tensor) -> Tensor:
        """Chance of a revealed token to be masked again, a scalar or [R, L].

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
    """Chance of a masked token to be revealed, of sigma's shape."""
    return (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
