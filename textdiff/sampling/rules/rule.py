"""The base of all decoding rules."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from textdiff.diffusion.family import Family
from textdiff.sampling.segment import Segment, Step


@dataclass(frozen=True)
class Rule(ABC):
    """A decoding rule and its knobs: called on a segment, it yields the steps that fill it.

    Knobs are the fields of a rule; `dataclasses.replace` sets them, and values out of range are a
    ConfigError. What becomes of a row depends on the row alone, whoever shares its batch.

    Attributes:
        processes: names of the forward processes that the rule is defined for.
        otherwise: what to say, after "rule ... ", to those who have another process.
        needs_score: whether it walks along scores, which only some objectives predict.
        reveals_ahead: whether masks are revealed at times that the network has no part in.
    """

    processes: ClassVar[tuple[str, ...]]
    otherwise: ClassVar[str] = ""
    needs_score: ClassVar[bool] = False
    reveals_ahead: ClassVar[bool] = False

    def refusal(self, family: Family) -> str | None:
        """Why the rule does not fit a family, as the end of a sentence; None: it does."""
        if family.process.name not in self.processes:
            return f"{self.otherwise}, and noise here is {family.process.name}"
        if self.needs_score and not family.objective.predicts_score:
            return "walks along scores, which this objective does not predict"
        if self.reveals_ahead and family.objective.predicts_mask:
            return f"{self.otherwise}, and here the network predicts masks, too"
        return None

    def suited(self, family: Family) -> "Rule":
        """The rule as it runs on a family, with the same knobs; here itself."""
        return self

    @abstractmethod
    def __call__(self, segment: Segment) -> Iterator[Step]:
        """Fill the open positions of a segment, yielding a step after every network call."""
