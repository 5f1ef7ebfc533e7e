"""Training rows of conversations, addressed by one endless index.

A row holds one conversation, or as many as fit. Where the sequence is one block, it holds one
answer of its conversation with what came before; which one is drawn. Padding follows. It is never
scored, and blocks do not see what follows them.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from textdiff.data.answer_layout import Kept, RowLayout, Written, fill_unit
from textdiff.data.sections import Conversations
from textdiff.data.sequences import Epochs
from textdiff.data.token_stream import TokenStream
from textdiff.errors import DataError

_TURN = 2  # purpose of random words, beside those of `sequences`

Held = tuple[int, Kept]
"""Number of a conversation, and what a row holds of it."""


@dataclass(frozen=True)
class AnswerRows:
    """Rows of conversations.

    Attributes:
        tokens: int64 [B, L].
        documents: int32 [B, L], which conversation of the row a token belongs to; -1: padding.
        scored: bool [B, L], see `Written`.
        answer_tokens: int64 [B], see `Written`.
    """

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32]
    scored: NDArray[np.bool_]
    answer_tokens: NDArray[np.int64]


class AnswerSequences(Epochs):
    """Rows of conversations, addressed by one endless index.

    Attributes:
        stream: the conversations; a prompt is a piece of a document, and so is an answer.
        sequence_length: L, in tokens.
        packed: whether rows hold several conversations.
        dropped: how many conversations are not trained on.
        shortened: how many lose turns, or the end of an answer.

    Args:
        stream: the conversations.
        sequence_length: L, in tokens.
        seed: a non-negative integer.
        settings: how rows are packed, and what becomes of conversations that are too long.
        block_sizes: those that are trained; answers are filled up to multiples of all of them.
        special: ids of the end-of-text token and of the padding.

    Raises:
        DataError: conversations that are too long, where they are refused; or all of them are.
    """

    def __init__(
        self,
        stream: TokenStream,
        sequence_length: int,
        seed: int,
        settings: Conversations,
        block_sizes: Sequence[int | None],
        special: tuple[int, int],
    ) -> None:
        super().__init__(seed)
        self.stream, self.sequence_length = stream, sequence_length
        self.packed = settings.packing == "packed"
        end, self._pad = special
        self._whole = RowLayout(sequence_length, None, end)
        self._blocks = RowLayout(sequence_length, fill_unit(block_sizes), end)
        parts = self._fitting(settings.too_long)
        self.dropped = stream.num_documents - len(parts)
        self.shortened = sum(
            kept.cut is not None or kept.turns < len(self._lengths(number))
            for number, kept in parts
        )
        self._bins = self._packed(parts) if self.packed else [[held] for held in parts]

    def _fitting(self, too_long: str) -> list[Held]:
        parts = []
        for number in range(self.stream.num_documents):
            where, lengths = f"conversation {number + 1}", self._lengths(number)
            kept = self._blocks.fit(lengths, too_long, where)
            if kept is not None:
                parts.append((number, kept))
        if not parts:
            raise DataError(
                f"every conversation is longer than a sequence of {self.sequence_length} tokens; "
                "raise data.sequence_length",
                code="all_too_long",
            )
        return parts

    def __len__(self) -> int:
        """Return the rows per epoch."""
        return len(self._bins)

    def rows(self, indices: Sequence[int], whole: bool = False) -> AnswerRows:
        """Read samples.

        Args:
            indices: global sample indices 0, 1, 2, … without an end, in any order.
            whole: whether the sequence is one block.
        """
        shape = (len(indices), self.sequence_length)
        tokens, documents = np.full(shape, self._pad, np.int64), np.full(shape, -1, np.int32)
        scored, counts = np.zeros(shape, bool), np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            start = 0
            for document, held in enumerate(self._parts(index, whole)):
                written = self._written(held, whole)
                span = slice(start, start + len(written.tokens))
                tokens[row, span], scored[row, span] = written.tokens, written.scored
                documents[row, span] = document
                counts[row] += written.answer_tokens
                start = span.stop
        return AnswerRows(tokens, documents, scored, counts)

    def answer_tokens(self, indices: Sequence[int], whole: bool = False) -> int:
        """Return the tokens of the answers of some samples, without their ends."""
        parts = [held for index in indices for held in self._parts(index, whole)]
        return sum(self._counted(number, kept, whole) for number, kept in parts)

    @property
    def notes(self) -> list[str]:
        """Sentences about what is not trained on."""
        total, length = self.stream.num_documents, self.sequence_length
        counts = {"dropped": self.dropped, "cut": self.shortened}
        return [
            f"{done} {count:,} of {total:,} conversations, which are longer than a sequence of "
            f"{length} tokens"
            for done, count in counts.items()
            if count
        ]

    def _parts(self, index: int, whole: bool) -> list[Held]:
        _, rows = self.shuffled([index])
        parts = self._bins[int(rows[0])]
        if not whole:
            return parts
        ((number, kept),) = parts
        seeds = np.random.SeedSequence((self.seed, int(index), _TURN))
        drawn = int(seeds.generate_state(1, np.uint64)[0]) % kept.turns
        return [(number, Kept(drawn + 1, kept.cut))]

    def _written(self, held: Held, whole: bool) -> Written:
        number, kept = held
        edges = pairwise(self.stream.edges(number).tolist())
        pieces = [self.stream.read(start, stop) for start, stop in edges]
        turns = list(zip(pieces[::2], pieces[1::2], strict=True))[: kept.turns]
        return (self._whole if whole else self._blocks).write(turns, kept.cut)

    def _counted(self, number: int, kept: Kept, whole: bool) -> int:
        if kept.cut is not None:
            return kept.cut
        lengths = self._lengths(number)[: kept.turns]
        return sum(answer - 1 for _, answer in (lengths[-1:] if whole else lengths))

    def _size(self, held: Held) -> int:
        number, kept = held
        if kept.cut is not None:
            return self.sequence_length
        return self._blocks.ends(self._lengths(number)[: kept.turns])[-1]

    def _lengths(self, number: int) -> list[tuple[int, int]]:
        """Return the tokens of prompt and answer of every turn of a conversation."""
        lengths = np.diff(self.stream.edges(number)).tolist()
        return list(zip(lengths[::2], lengths[1::2], strict=True))

    def _packed(self, parts: Sequence[Held]) -> list[list[Held]]:
        """Put conversations into rows, the longest first, each where it leaves the least room."""
        rows: list[list[Held]] = []
        rooms: list[int] = []  # ascending, every room that a row has left
        by_room: dict[int, list[int]] = {}
        for size, held in sorted((-self._size(held), held) for held in parts):
            at = bisect_left(rooms, -size)
            room, row = self.sequence_length, len(rows)
            if at == len(rooms):
                rows.append([])
            else:
                room = rooms[at]
                row = by_room[room].pop()
                if not by_room[room]:
                    del rooms[at], by_room[room]
            rows[row].append(held)
            left = room + size
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
        return rows
