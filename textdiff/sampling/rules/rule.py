"""The base of all decoding rules."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict

from textdiff.section import Section

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

    from textdiff.diffusion.family import Family
    from textdiff.sampling.segment import Segment
    from textdiff.sampling.step import Step


class Rule(Section):
    """A decoding rule and its knobs: called on a segment, it yields the steps that fill it.

    The knobs are the fields besides `kind`; the first line of a rule's docstring is its summary.
    What becomes of a row depends on the row alone, not on the rows of its batch.

    Attributes:
        processes: names of the forward processes that the rule is defined for.
        task: what it does, for messages to users of other processes.
        needs_score: whether it follows scores, which only some objectives predict.
        reveals_ahead: whether the network has no influence on when masks are revealed.
        chance: why one text can be written in several ways, as the end of a sentence; empty where
            positions follow from predictions alone, before tokens are drawn: then the text's
            likelihood is exact (`teacher_forcing`). Each token is then drawn by one `write`.
        revises: whether it may mask again what it has revealed.
    """

    model_config = ConfigDict(strict=True)

    processes: ClassVar[tuple[str, ...]]
    task: ClassVar[str] = ""
    needs_score: ClassVar[bool] = False
    reveals_ahead: ClassVar[bool] = False
    chance: ClassVar[str] = "does not say that predictions alone decide which positions come next"
    revises: ClassVar[bool] = False

    kind: str

    @classmethod
    def knobs(cls) -> dict[str, FieldInfo]:
        """Return the fields that users may set, by name."""
        return {name: field for name, field in cls.model_fields.items() if name != "kind"}

    @classmethod
    def refusal(cls, family: Family) -> str | None:
        """Return why the rule does not fit a family, as the end of a sentence; None: it fits."""
        if family.process.name not in cls.processes:
            return f"{cls.task}, and noise here is {family.process.name}"
        if cls.needs_score and not family.objective.predicts_score:
            return "follows scores, which this objective does not predict"
        if cls.reveals_ahead and family.objective.predicts_mask:
            return f"{cls.task}, and here the network predicts masks, too"
        return None

    def likelihood_refusal(self) -> str | None:
        """Return why its texts have no exact likelihood, as the end of a sentence; None: they do.

        Knobs may matter: see `chance`.
        """
        return self.chance or None

    def suited(self, family: Family) -> Rule:
        """Return the rule as it runs on a family, with the same knobs."""
        return self

    @abstractmethod
    def __call__(self, segment: Segment) -> Iterator[Step]:
        """Fill the open positions of a segment, yielding a step after every network call."""
