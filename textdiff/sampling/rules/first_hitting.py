"""First hitting: one masked position per network call, each at the time it is revealed.

Between two reveals nothing happens, so the walk may go from reveal to reveal: with k masks left the
next noise level is lambda_{k-1} = lambda_k u^(1/k), and every masked position is equally likely
(Sec. 4.1, arXiv:2409.02908). That is the law of `ancestral` as its steps grow without limit. The
levels are the order statistics of k independent ones, which is how they are drawn here: from the
uniforms that `ancestral` would use, so that with enough steps the two agree token for token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.randomness import Stream
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class FirstHitting(Rule):
    """Fills the open positions in exactly one network call each; `steps` is not used."""

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    otherwise: ClassVar[str] = "reveals masks at times that must not depend on the token"
    reveals_ahead: ClassVar[bool] = True

    def __call__(self, segment: Segment) -> Iterator[Step]:
        u = segment.uniforms(Stream.POSITION, 0)
        order, times = hitting_times(segment.schedule, u, segment.frozen)  # [R, S] each
        remaining = (~segment.frozen).sum(1)  # [R]
        starts = torch.arange(len(order)) * order.shape[1]
        for index in range(int(remaining.max()) if len(remaining) else 0):
            positions = (starts + order[:, index])[remaining > index]
            t = times[:, index]
            prediction = segment.predict(positions, t)
            yield segment.write(positions, prediction.log_x0, t)


def hitting_times(schedule: NoiseSchedule, u: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """When each position is revealed, in the order of revealing.

    Args:
        schedule: noise schedule; a mask is left to see alpha with chance (1 - alpha) / lambda_1.
        u: [R, L] uniforms.
        frozen: [R, L] bool, positions that are not revealed; they come last, at time 0.

    Returns:
        [R, L] positions and [R, L] falling times.
    """
    ordered, order = u.masked_fill(frozen, 1.0).sort(dim=1, stable=True)
    alpha = schedule.alpha(torch.ones((), dtype=torch.float64))
    # Later than a schedule without ideal end has left anything masked, there is its end.
    return order, schedule.t_of_alpha(alpha + (1.0 - alpha) * ordered).clamp(0.0, 1.0)
