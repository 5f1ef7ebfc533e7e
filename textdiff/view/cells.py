"""Cells of a row: the text at each position, and the kind of token that it is.

| kind | what it is |
|---|---|
| given | a token of the prompt |
| kept | a token that is there already |
| fresh | a token of this step |
| draft | what the network would take for a mask |
| open | a mask of which nothing is known |
| lost | a token that was masked or noised again in this step |
| cut | what follows the end of the text, and will not be part of it |
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import continuation, opening

END = "∎"
"""Sign of an end-of-text token on a screen."""

_BEGINNING = -1  # stands for the token before a text
_BROKEN = "\ufffd"
_LONGEST = 4  # bytes of a character, and so tokens


class Pieces:
    """Decoder of single tokens.

    A character may take several tokens, and the text of a token may depend on the one before it. So
    the strings are cut out of the joint text of neighbours: a character belongs to the token that
    completes it.

    Args:
        tokenizer: the model's.
        hidden: ids that have no text: the mask.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, hidden: Sequence[int]):
        self.tokenizer, self.hidden = tokenizer, frozenset(hidden)
        self.onward, self.opening = continuation(tokenizer), opening(tokenizer)
        self.special = {
            token: END if token == tokenizer.eos_token_id else str(tokenizer.decode([token]))
            for token in tokenizer.all_special_ids
        }
        self._after = lru_cache(maxsize=1 << 16)(self._decode_after)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """Return each token's string; empty where it is hidden or a later token completes it."""
        shown = [""] * len(ids)
        run = _Run(self._after, shown)
        for at, token in enumerate(ids):
            if token in self.hidden or token in self.special:
                run.close(at)
                shown[at] = self.special.get(token, "") if token not in self.hidden else ""
            else:
                run.add(at, token)
        run.close(len(ids))
        return shown

    def _decode_after(self, before: int | None, tokens: tuple[int, ...]) -> str:
        alone = str((self.opening if before == _BEGINNING else self.onward).decode(list(tokens)))
        if before is None or before == _BEGINNING:
            return alone
        first = str(self.tokenizer.decode([before]))
        both = str(self.tokenizer.decode([before, *tokens]))
        return both[len(first) :] if both.startswith(first) else alone


class _Run:
    """Run of neighbouring tokens whose text is split as they come.

    Args:
        after: decodes tokens after the one before them.
        shown: where the strings of all positions go.
    """

    def __init__(self, after: Callable[[int | None, tuple[int, ...]], str], shown: list[str]):
        self.after, self.shown = after, shown
        self.before: int | None = _BEGINNING
        self.pending: list[int] = []  # tokens since a character was complete
        self.printed = 0  # characters of these that are shown already

    def add(self, at: int, token: int) -> None:
        """Show what the token completes."""
        self.pending.append(token)
        text = self.after(self.before, tuple(self.pending))
        if text[self.printed :].strip(_BROKEN):
            self._show(at, text[self.printed : len(text) - text.endswith(_BROKEN)])
            if text.endswith(_BROKEN):  # it also begins the next character
                self.before, self.pending = None, [token]
                self.printed = len(self.after(None, (token,))) - 1
            else:
                self.before, self.pending, self.printed = token, [], 0
        elif len(self.pending) > _LONGEST:  # the first of them belongs to no character
            self.shown[at - _LONGEST] += text[:1]
            self.before, self.pending, self.printed = None, self.pending[1:], 0

    def _show(self, at: int, new: str) -> None:
        """Set a token's string; stray bytes before a character go to the token before it."""
        broken = len(new) - len(new.lstrip(_BROKEN)) if len(self.pending) > 1 else 0
        self.shown[at - 1] += new[:broken]
        self.shown[at] = new[broken:]

    def close(self, end: int) -> None:
        """End a run of neighbours: half a character is shown where its last token is."""
        if self.pending:
            text = self.after(self.before, tuple(self.pending))
            self.shown[end - 1] += text[self.printed :]
        self.before, self.pending, self.printed = None, [], 0


class Kind(StrEnum):
    """Kind of token at a position."""

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
    """Text of one position.

    Attributes:
        text: its string, control characters made visible; empty inside a character.
        kind: what kind of token it is.
    """

    text: str
    kind: Kind


@dataclass(frozen=True)
class Reader:
    """Maker of cells from token ids.

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
        """Return the cells of a row.

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
    """Return the text without control characters; line breaks stay."""
    return text.translate(_NAMES)
