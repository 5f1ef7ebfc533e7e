"""What a training run tells the outside; the trainer itself prints nothing."""

from dataclasses import dataclass
from typing import Any

from textdiff.likelihood import Bound
from textdiff.train.ranges import RangeChoice


@dataclass(frozen=True)
class StepReport:
    """One logged step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: training loss since the last report, nats per token: with the weights, over the mask
            rates and in the block sizes of training, so in general no bound.
        learning_rate: of AdamW.
        grad_norm: gradient norm of the last step before clipping.
        tokens: training tokens seen.
        tokens_per_second: since the last report.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float


class Reporter:
    """Receives what happens; every method may be overridden, none needs to be."""

    def message(self, text: str) -> None:
        """A sentence about the run."""

    def started(self, facts: dict[str, Any]) -> None:
        """The run is set up: directory, parameters, precision, where it resumes."""

    def stepped(self, step: int) -> None:
        """An optimizer step was issued."""

    def logged(self, report: StepReport) -> None:
        """A step was logged."""

    def evaluating(self, done: int, total: int) -> None:
        """The validation bound has scored this many windows."""

    def evaluated(self, step: int, bound: Bound) -> None:
        """A validation bound is there."""

    def also_evaluated(self, step: int, block_size: int | None, bound: Bound) -> None:
        """The bound in another of the block sizes that are trained is there, before `evaluated`."""

    def range_found(self, step: int, block_size: int | None, choice: RangeChoice) -> None:
        """Mask rates for training in a block size were chosen, before `evaluated`."""

    def sampled(self, step: int, texts: list[str]) -> None:
        """Samples were drawn."""

    def finished(self) -> None:
        """Training is over."""
