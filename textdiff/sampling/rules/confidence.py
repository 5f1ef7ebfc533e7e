"""Confidence: the positions the network is surest of come first, so many tokens per call.

How sure is read from the raw distribution: its largest probability (low-confidence remasking,
arXiv:2502.09992; MaskGIT, arXiv:2202.04200), the margin between its two largest
(arXiv:2502.06768), or its entropy (Dream, arXiv:2508.15487).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.sampling.rules.knobs import check_choice, check_number
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.unmasking import ORDERS, even_share, unmask
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Confidence(Rule):
    """Reveals the surest positions, in exactly `steps` calls where there are as many positions.

    Attributes:
        order: `probability`, `margin` or `entropy`.
        order_temperature: 0 takes the surest; else positions are drawn without replacement in
            proportion to sureness to the power of its inverse (e to the minus entropy, for
            entropies).
        pace: tokens per call: `even` shares them out, the first calls taking what is left over;
            `noise` follows the noise schedule, as ancestral sampling does on average.
    """

    order: str = "probability"
    order_temperature: float = 0.0
    pace: str = "even"

    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    otherwise: ClassVar[str] = "reveals masks in an order of its own"

    def __post_init__(self) -> None:
        check_choice("order", self.order, ORDERS)
        check_number("order_temperature", self.order_temperature, 0.0)
        check_choice("pace", self.pace, ("even", "noise"))

    def __call__(self, segment: Segment) -> Iterator[Step]:
        steps, size = segment.steps, (~segment.frozen).sum(1)
        times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
        alphas = segment.schedule.alpha(times)
        still = (1.0 - alphas) / (1.0 - alphas[0])

        def count(ranked: Tensor, left: Tensor, calls: int) -> Tensor:
            if self.pace == "even":
                return even_share(left, calls)
            return left - (size * still[steps + 1 - calls]).floor().to(torch.int64)

        yield from unmask(segment, ORDERS[self.order], count, self.order_temperature)
