"""Entropy bound: as many positions as can be revealed together at a bounded risk.

In order of rising entropy, the longest beginning whose entropies add up to at most gamma, the
largest left out (arXiv:2505.24857). That sum bounds how much the tokens revealed together
can depend on each other; `Step.dependence` is the bound that each call had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from textdiff.lazy import torch
from textdiff.sampling.rules.unmasking import OrderedRule, even_share, low_entropy, unmask_in_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from textdiff.sampling.segment import Segment, Step


class EntropyBound(OrderedRule):
    """Reveals what the bound allows, and what is needed to be done in `steps` calls."""

    kind: Literal["entropy_bound"] = "entropy_bound"
    entropy_bound: float = Field(
        0.1, ge=0.0, description="nats per call; 0 reveals uncertain tokens one by one"
    )

    def __call__(self, segment: Segment) -> Iterator[Step]:
        yield from unmask_in_order(segment, low_entropy, self._safe)

    def _safe(self, ranked: Tensor, left: Tensor, calls: int) -> Tensor:
        nats = -ranked  # infinite where there is no mask
        before = nats.cumsum(1) - nats.cummax(1).values
        return torch.maximum((before <= self.entropy_bound).sum(1), even_share(left, calls))
