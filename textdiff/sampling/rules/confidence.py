"""Confidence: the positions of the most confident predictions first, so many tokens per call.

Confidence is read from the raw distribution: its largest probability (low-confidence remasking,
arXiv:2502.09992; MaskGIT, arXiv:2202.04200), the margin between its two largest
(arXiv:2502.06768), or its entropy (Dream, arXiv:2508.15487).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from textdiff.sampling.rules.redrawing import even_times
from textdiff.sampling.rules.unmasking import (
    OrderedRule,
    even_share,
    low_entropy,
    margin,
    most_likely,
    unmask_in_order,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.sampling.segment import Segment, Step

ORDERS = {"probability": most_likely, "margin": margin, "entropy": low_entropy}


class Confidence(OrderedRule):
    """Reveals the most confident positions, in `steps` calls where there are as many positions."""

    kind: Literal["confidence"] = "confidence"
    order: Literal["probability", "margin", "entropy"] = Field(
        "probability",
        description="largest probability; lead of the first token over the second; lowest entropy",
    )
    order_temperature: float = Field(
        0.0,
        ge=0.0,
        description="0 takes the most confident; else positions are drawn without replacement in "
        "proportion to confidence to the power 1/temperature",
    )
    pace: Literal["even", "noise"] = Field(
        "even",
        description="tokens per call: shared out evenly, the first calls taking the remainder; or "
        "following the noise schedule, as ancestral sampling does on average",
    )

    def __call__(self, segment: Segment) -> Iterator[Step]:
        steps, size = segment.steps, (~segment.frozen).sum(1)
        alphas = segment.schedule.alpha(even_times(steps))
        still = (1.0 - alphas) / (1.0 - alphas[0])

        def count(ranked: Tensor, left: Tensor, calls: int) -> Tensor:
            if self.pace == "even":
                return even_share(left, calls)
            return left - (size * still[steps + 1 - calls]).floor().long()

        yield from unmask_in_order(segment, ORDERS[self.order], count, self.order_temperature)
