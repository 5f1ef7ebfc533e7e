"""Threshold: every position whose prediction is confident enough, at least one per call.

Enough is a largest probability of at least `threshold`, or, for n positions revealed together,
(n + 1)(1 - c_n) < `factor` with c_n the smallest of theirs (both arXiv:2505.22618): at factor 1 the
tokens most likely together are those most likely one by one, which a threshold promises for up to
1 / (1 - threshold) - 1 of them only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from textdiff.lazy import torch
from textdiff.sampling.rules.unmasking import OrderedRule, even_share, most_likely, unmask_in_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.sampling.segment import Segment, Step


class Threshold(OrderedRule):
    """Reveals what is likely enough, and what is needed to be done in `steps` calls."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(
        0.9, ge=0.0, le=1.0, description="least probability of the likeliest token"
    )
    factor: float | None = Field(
        None, ge=0.0, description="f of the other criterion, which then replaces the threshold"
    )

    def __call__(self, segment: Segment) -> Iterator[Step]:
        yield from unmask_in_order(segment, most_likely, self._confident)

    def _confident(self, ranked: Tensor, left: Tensor, calls: int) -> Tensor:
        if self.factor is None:
            confident = (ranked.exp() >= self.threshold).sum(1)
        else:
            doubt = -torch.expm1(ranked)  # 1 - c, which rises, so that what fits is a beginning
            n = torch.arange(1, ranked.shape[1] + 1)
            confident = ((n + 1) * doubt < self.factor).sum(1)
        return torch.maximum(confident, even_share(left, calls))
