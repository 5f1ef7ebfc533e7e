"""Threshold: every position that the network is sure enough of, at least one per call.

Sure enough is a largest probability of at least `threshold`, or, for n positions revealed together,
(n + 1)(1 - c_n) < `factor` with c_n the smallest of theirs (both arXiv:2505.22618): at factor 1 the
tokens most likely together are those most likely one by one, which a threshold promises for up to
1 / (1 - threshold) - 1 of them only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.sampling.rules.knobs import check_number
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.unmasking import even_share, most_likely, unmask
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Threshold(Rule):
    """Reveals what is likely enough, and what is needed to be done in `steps` calls.

    Attributes:
        threshold: least probability of the likeliest token.
        factor: f of the other criterion, which then replaces the threshold; None: the threshold.
    """

    threshold: float = 0.9
    factor: float | None = None

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    otherwise: ClassVar[str] = "reveals masks in an order of its own"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0.0, 1.0)
        if self.factor is not None:
            check_number("factor", self.factor, 0.0)

    def __call__(self, segment: Segment) -> Iterator[Step]:
        yield from unmask(segment, most_likely, self._sure)

    def _sure(self, ranked: Tensor, left: Tensor, calls: int) -> Tensor:
        if self.factor is None:
            sure = (ranked.exp() >= self.threshold).sum(1)
        else:
            doubt = -torch.expm1(ranked)  # 1 - c, which rises, so that what fits is a beginning
            n = torch.arange(1, ranked.shape[1] + 1)
            sure = ((n + 1) * doubt < self.factor).sum(1)
        return torch.maximum(sure, even_share(left, calls))
