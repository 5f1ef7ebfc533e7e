"""First hitting: one masked position per network call, each at the time it is revealed.

Between two reveals nothing happens, so the walk may go from reveal to reveal. With k masks left the
next noise level is lambda_{k-1} = lambda_k u^(1/k). Every masked position is equally likely
(Sec. 4.1, arXiv:2409.02908). It is the limit of `ancestral` for many steps. The levels are the
order statistics of k independent ones, which is how they are drawn here: from the uniforms that
`ancestral` would use, so that with enough steps the two agree token for token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from textdiff.sampling.rules.rule import Rule
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.diffusion.schedule import NoiseSchedule
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


class FirstHitting(Rule):
    """Reveals one open position per network call; `steps` is not used."""

    kind: Literal["first_hitting"] = "first_hitting"

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    task: ClassVar[str] = "reveals masks at times that must not depend on the token"
    reveals_ahead: ClassVar[bool] = True
    chance: ClassVar[str] = "draws the position that comes next"

    def __call__(self, segment: Segment) -> Iterator[Step]:
        u = segment.position_uniforms(0)
        order, times = hitting_times(segment.schedule, u, segment.frozen)  # [R, S] each
        remaining = (~segment.frozen).sum(1)  # [R]
        starts = torch.arange(len(order)) * order.shape[1]
        for index in range(int(remaining.max()) if len(remaining) else 0):
            positions = (starts + order[:, index])[remaining > index]
            yield segment.reveal(positions, times[:, index])


def hitting_times(schedule: NoiseSchedule, u: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
    """Return when each position is revealed, in the order of revealing.

    Args:
        schedule: noise schedule; a mask is left to see alpha with chance (1 - alpha) / lambda_1.
        u: [R, L] uniforms.
        frozen: [R, L] bool, positions that are not revealed; they come last, at time 0.

    Returns:
        [R, L] positions and [R, L] falling times.
    """
    ordered, order = u.masked_fill(frozen, 1.0).sort(dim=1, stable=True)
    alpha = schedule.alpha(torch.ones((), dtype=torch.float64))
    # A schedule that ends below alpha = 1 leaves masks until its end.
    return order, schedule.t_of_alpha(alpha + (1.0 - alpha) * ordered).clamp(0.0, 1.0)
