"""Conversations in a row: what is given, what is scored, and where a block ends.

In blocks an answer may begin inside a block. Behind its end-of-text token its last block is filled
with the same token, which is scored as well: the next turn starts a new block, and no token of an
answer sees a later turn in its own block. Where the whole sequence is one block, everything is
seen: a row then holds one answer, what came before it, and the fill up to the row's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from textdiff.data.encode import Ids
from textdiff.errors import DataError


def fill_unit(block_sizes: Sequence[int | None]) -> int:
    """Return the multiple that answers are filled up to: every block size divides it."""
    return lcm(*(size for size in block_sizes if size is not None))


class Kept(NamedTuple):
    """Part of a conversation that a row can hold.

    Attributes:
        turns: how many of its turns, from the first one on.
        cut: tokens of the first answer, where not even the first turn fits; None: it does.
    """

    turns: int
    cut: int | None = None


class Written(NamedTuple):
    """Turns as they stand in a row.

    Attributes:
        tokens: int32 [T].
        scored: bool [T], answers with their ends and what fills their last blocks.
        answer_tokens: tokens of the scored answers, without their ends.
    """

    tokens: Ids
    scored: NDArray[np.bool_]
    answer_tokens: int


@dataclass(frozen=True)
class RowLayout:
    """Layout of conversations in rows.

    Attributes:
        length: tokens of a row.
        block: tokens per block, to whose multiples answers are filled up; None: the whole row is
            one block.
        end: id of the end-of-text token.
    """

    length: int
    block: int | None
    end: int

    def ends(self, turns: Sequence[tuple[int, int]]) -> list[int]:
        """Return the places at which turns of so many tokens end, fill in blocks included."""
        place, ends, unit = 0, [], self.block or 1
        for prompt, answer in turns:
            place = -(-(place + prompt + answer) // unit) * unit
            ends.append(place)
        return ends

    def fit(self, turns: Sequence[tuple[int, int]], too_long: str, where: str) -> Kept | None:
        """Return what a row can hold of a conversation; None: nothing.

        Args:
            turns: tokens of the prompt and of the answer of each.
            too_long: what becomes of a longer one: `refuse`, `drop` or `cut`.
            where: its name.

        Raises:
            DataError: it is longer, and that is refused.
        """
        ends = self.ends(turns)
        if ends[-1] <= self.length:
            return Kept(len(turns))
        if too_long == "refuse":
            raise self._too_long(turns, ends[-1], where)
        fitting, room = sum(end <= self.length for end in ends), self.length - turns[0][0]
        if too_long == "drop" or (not fitting and room < 1):
            return None
        return Kept(fitting) if fitting else Kept(1, room)

    def _too_long(self, turns: Sequence[tuple[int, int]], total: int, where: str) -> DataError:
        alone = max(answer for _, answer in turns)
        longer = f"a sequence of {self.length} tokens"
        advice = (
            "shorten it or leave it out; in training raise data.sequence_length, or set "
            "data.conversations.too_long to drop or cut"
        )
        if alone > self.length:
            return DataError(
                f"{where} has an answer of {alone} tokens, longer than {longer}; {advice}",
                code="answer_too_long",
            )
        return DataError(
            f"{where} takes {total} tokens, more than {longer}; {advice}",
            code="conversation_too_long",
        )

    def write(
        self, turns: Sequence[tuple[Ids, Ids]], cut: int | None = None, last_only: bool = False
    ) -> Written:
        """Write turns as a row holds them.

        Args:
            turns: tokens of prompt and answer of each.
            cut: see `Kept`.
            last_only: score the last answer only, as always in a row that is one block.
        """
        pieces: list[Ids] = []
        marks: list[NDArray[np.bool_]] = []
        length = counted = 0
        for number, (prompt, answer) in enumerate(turns, start=1):
            last = number == len(turns)
            answer = answer if cut is None else answer[:cut]
            length += len(prompt) + len(answer)
            fill = -length % self.block if self.block else (self.length - length) * last
            length += fill
            scored = last or not (last_only or self.block is None)
            counted += (len(answer) - (cut is None)) * scored
            pieces += [prompt, answer, np.full(fill, self.end, np.int32)]
            marks += [np.zeros(len(prompt), bool), np.full(len(answer) + fill, scored)]
        return Written(np.concatenate(pieces), np.concatenate(marks), counted)
