"""A row as the eye sees it: what stands at each position, and what kind of token that is.

| kind | what it is |
|---|---|
| given | a token of the prompt |
| kept | a token that is there already |
| fresh | a token of this step |
| draft | what the network would take for a mask |
| open | a mask of which nothing is known |
| lost | a token that was masked again in this step |
| cut | what follows the end of the text, and will not be part of it |
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import StrEnum

from textdiff.view.pieces import Pieces


class Kind(StrEnum):
    """What kind of token stands at a position."""

    GIVEN = "given"
    KEPT = "kept"
    FRESH = "fresh"
    DRAFT = "draft"
    OPEN = "open"
    LOST = "lost"
    CUT = "cut"


OPEN_TEXT = "░░"
"""How a mask is shown of which nothing is known."""

BREAK_TEXT = "↵"
"""How a line break is shown in a draft."""


@dataclass(frozen=True)
class Cell:
    """What stands at one position.

    Attributes:
        text: its string, control characters made visible; empty inside a character.
        kind: what kind of token it is.
    """

    text: str
    kind: Kind


@dataclass(frozen=True)
class Reader:
    """Turns token ids into cells.

    Attributes:
        pieces: decodes tokens.
        mask: id of the mask token.
        end: id of the end-of-text token, if there is one.
    """

    pieces: Pieces
    mask: int
    end: int | None

    def cells(
        self,
        ids: Sequence[int],
        draft: Sequence[int] | None,
        given: Container[int],
        fresh: Container[int],
        lost: Container[int],
    ) -> list[Cell]:
        """The cells of a row.

        Args:
            ids: its tokens.
            draft: the same with masks filled, if known.
            given: positions that were given.
            fresh: positions that got a token in this step.
            lost: positions that were masked again in this step.
        """
        guess = ids if draft is None else draft
        filled = [b if a == self.mask else a for a, b in zip(ids, guess, strict=True)]
        shown = self.pieces(filled)
        cells, over = [], False
        for at, token in enumerate(ids):
            kind = self._kind(at, token, draft, given, fresh, lost)
            text = visible(shown[at])
            if kind in (Kind.DRAFT, Kind.LOST):  # a guess breaks no line
                text = text.replace("\n", BREAK_TEXT)
            if token == self.mask and (draft is None or draft[at] == self.mask):
                text = OPEN_TEXT
            cells.append(Cell(text, Kind.CUT if over else kind))
            over = over or (token == self.end and at not in given)
        return cells

    def _kind(
        self,
        at: int,
        token: int,
        draft: Sequence[int] | None,
        given: Container[int],
        fresh: Container[int],
        lost: Container[int],
    ) -> Kind:
        if at in given:
            return Kind.GIVEN
        if at in lost:
            return Kind.LOST
        if token != self.mask:
            return Kind.FRESH if at in fresh else Kind.KEPT
        return Kind.OPEN if draft is None or draft[at] == self.mask else Kind.DRAFT


_NAMES = {ord("\t"): "    ", ord("\r"): "␍"} | {
    code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n\r"
}
_NAMES |= {0x7F: "␡"} | {code: "\ufffd" for code in range(0x80, 0xA0)}
_NAMES |= {code: "" for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """The text without what would steer a terminal; line breaks stay."""
    return text.translate(_NAMES)
