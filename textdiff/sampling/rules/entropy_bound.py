"""Entropy bound: as many positions as can be revealed together at a bounded risk.

In order of rising entropy, the longest beginning whose entropies add up to at most gamma, the
largest left out (arXiv:2505.24857). That sum bounds how much the tokens revealed together
can depend on each other; `Step.dependence` says what each call risked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.sampling.rules.knobs import check_number
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.unmasking import even_share, low_entropy, unmask
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class EntropyBound(Rule):
    """Reveals what the bound allows, and what is needed to be done in `steps` calls.

    Attributes:
        entropy_bound: gamma in nats per call; 0 reveals one by one what is not certain.
    """

    entropy_bound: float = 0.1

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    otherwise: ClassVar[str] = "reveals masks in an order of its own"

    def __post_init__(self) -> None:
        check_number("entropy_bound", self.entropy_bound, 0.0)

    def __call__(self, segment: Segment) -> Iterator[Step]:
        yield from unmask(segment, low_entropy, self._safe)

    def _safe(self, ranked: Tensor, left: Tensor, calls: int) -> Tensor:
        nats = -ranked  # infinite where there is no mask
        before = nats.cumsum(1) - nats.cummax(1).values
        return torch.maximum((before <= self.entropy_bound).sum(1), even_share(left, calls))
