"""Rules in which the network chooses the order, and that differ in the number of tokens per call.

Confidence is read from the raw distribution: its largest probability (low-confidence remasking,
arXiv:2502.09992; MaskGIT, arXiv:2202.04200), the margin between its two largest
(arXiv:2502.06768), or its entropy (Dream, arXiv:2508.15487).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from textdiff.sampling.rules.redrawing import even_times
from textdiff.sampling.rules.renoising import accept_or_renoise
from textdiff.sampling.rules.revising import RevisingRule
from textdiff.sampling.rules.unmasking import (
    OrderedRule,
    even_share,
    low_entropy,
    margin,
    most_likely,
    place_scores,
    unmask_accepted,
    unmask_in_order,
)
from textdiff.section import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from torch import Tensor

    from textdiff.sampling.rules.unmasking import Score
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step

ORDERS = {"probability": most_likely, "margin": margin, "entropy": low_entropy}


class Confidence(OrderedRule):
    """Reveals the most confident positions, in `steps` calls where there are as many positions."""

    kind: Literal["confidence"] = "confidence"
    order: Literal["probability", "margin", "entropy", "position"] = Field(
        "probability",
        description="largest probability; lead of the first token over the second; lowest entropy; "
        "position goes from left to right, whatever the confidence",
    )
    positions: list[int] | None = Field(
        None,
        description="places of a block, or of the canvas, from 0, that order=position takes first, "
        "in this order; the others follow from left to right",
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

    @field_validator("positions")
    @classmethod
    def _are_places(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and (len(set(value)) < len(value) or min(value, default=0) < 0):
            raise ValueError("holds a negative place, or one twice; name each at most once, from 0")
        return value

    @model_validator(mode="after")
    def _fixes_the_order(self) -> Self:
        if self.positions is not None and self.order != "position":
            raise ValueError(f"positions fix the order, and order is {self.order}; set position")
        return self

    def likelihood_refusal(self) -> str | None:
        if self.order_temperature:
            return f"draws the order at order_temperature {self.order_temperature:g}; set it to 0"
        return super().likelihood_refusal()

    def __call__(self, segment: Segment) -> Iterator[Step]:
        steps, size = segment.steps, (~segment.frozen).sum(1)
        alphas = segment.schedule.alpha(even_times(steps))
        still = (1.0 - alphas) / (1.0 - alphas[0])

        def count(left: Tensor, calls: int) -> Tensor:
            if self.pace == "even":
                return even_share(left, calls)
            return left - (size * still[steps + 1 - calls]).floor().long()

        score: Score | Tensor
        if self.order == "position":  # nothing of it is read from the network
            score = place_scores(self.positions or (), segment.canvas.shape[1])
        else:
            score = ORDERS[self.order]
        yield from unmask_in_order(segment, score, count, self.order_temperature)


class AcceptingRule(OrderedRule, RevisingRule):
    """A rule that takes the most confident positions, as many as it accepts.

    Under absorbing noise they are revealed, and stay. Under noise that replaces tokens all others
    are drawn from the noise again, and what was accepted may be lost in the next call.
    """

    processes: ClassVar[tuple[str, ...]] = ("absorbing", "uniform", "hybrid")
    task: ClassVar[str] = "accepts tokens in an order of its own"

    def __call__(self, segment: Segment) -> Iterator[Step]:
        if segment.process.replaces_tokens:
            yield from accept_or_renoise(segment, self.score, self.accepted, self.revision(segment))
            return
        yield from unmask_accepted(segment, self.score, self.accepted)

    @property
    @abstractmethod
    def score(self) -> Score:
        """Confidence of distributions [N, V]."""

    @abstractmethod
    def accepted(self, ranked: Tensor) -> Tensor:
        """Return [R] how many of the most confident positions are accepted.

        Args:
            ranked: [R, S] confidences, falling; -inf where no position is left.
        """


class Threshold(AcceptingRule):
    """Accepts what is likely enough; under absorbing noise also what `steps` calls require.

    Enough is a largest probability of at least `threshold`. With `factor`, n positions are accepted
    together if (n + 1)(1 - c_n) < `factor`, c_n being the smallest of theirs (both
    arXiv:2505.22618). At factor 1 the tokens most likely together are those most likely one by one.
    A threshold promises that only for up to 1 / (1 - threshold) - 1 of them.
    """

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(
        0.9, ge=0.0, le=1.0, description="least probability of the likeliest token"
    )
    factor: float | None = Field(
        None, ge=0.0, description="f of the other criterion, which then replaces the threshold"
    )

    @property
    def score(self) -> Score:
        return most_likely

    def accepted(self, ranked: Tensor) -> Tensor:
        if self.factor is None:
            return (ranked.exp() >= self.threshold).sum(1)
        doubt = -torch.expm1(ranked)  # 1 - c, which rises, so that what fits is a beginning
        n = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        return ((n + 1) * doubt < self.factor).sum(1)


class EntropyBound(AcceptingRule):
    """Accepts what the bound allows; under absorbing noise also what `steps` calls require.

    In order of rising entropy, the longest beginning whose entropies add up to at most gamma, the
    largest left out (arXiv:2505.24857). That sum bounds how much the tokens drawn together can
    depend on each other; `Step.dependence` is the bound that each call had.
    """

    kind: Literal["entropy_bound"] = "entropy_bound"
    entropy_bound: float = Field(
        0.1, ge=0.0, description="nats per call; 0 accepts uncertain tokens one by one"
    )

    @property
    def score(self) -> Score:
        return low_entropy

    def accepted(self, ranked: Tensor) -> Tensor:
        nats = -ranked  # infinite where no position is left
        before = nats.cumsum(1) - nats.cummax(1).values
        return (before <= self.entropy_bound).sum(1)
