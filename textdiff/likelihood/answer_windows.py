"""Scored windows of conversations: every answer given all that came before it.

A conversation is a document and each of its turns a window, laid out as training lays it out. The
end-of-text token of an answer and the fill of its last block are scored and not counted. The bound
is one on the probability of the answer, its end and the fill together, and so on the answer's.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from textdiff.data.answer_layout import RowLayout, Written
from textdiff.data.answers import Turn, TurnEncoder
from textdiff.errors import DataError
from textdiff.likelihood.windows import Windows


def answer_windows(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    length: int,
    block_size: int | None,
    too_long: str = "refuse",
) -> Windows:
    """Encode conversations and return the windows of their answers.

    Args:
        tokenizer: the model's, with its chat template.
        documents: JSON texts of conversations, see `data.conversation_rows`.
        length: the model's sequence length in tokens.
        block_size: tokens per block; None: the whole sequence.
        too_long: what becomes of conversations that are longer: `refuse`, `drop` or `cut`.

    Raises:
        DataError: a conversation that cannot be encoded, or is too long where that is refused; or
            none is left.
    """
    encoder = TurnEncoder(tokenizer)
    layout = RowLayout(length, block_size, encoder.end)
    scored = []
    for number, document in enumerate(documents, start=1):
        where = f"conversation {number}"
        turns = encoder(document, where)
        lengths = [(len(turn.prompt), len(turn.answer)) for turn in turns]
        kept = layout.fit(lengths, too_long, where)
        if kept is not None:
            scored.append(_ScoredTurns.of(layout, turns[: kept.turns], kept.cut))
    if not scored:
        raise DataError(
            f"every conversation is longer than {length} tokens, the model's sequence length",
            code="all_too_long",
        )
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    return _joined(scored, digest)


class _ScoredTurns(NamedTuple):
    """Windows of one conversation: their rows, the places of their ends, bytes of the answers."""

    rows: list[Written]
    ends: list[int]
    bytes: int

    @classmethod
    def of(cls, layout: RowLayout, turns: Sequence[Turn], cut: int | None) -> "_ScoredTurns":
        pairs = [(turn.prompt, turn.answer) for turn in turns]
        counts = range(1, len(pairs) + 1)
        rows = [layout.write(pairs[:count], cut, last_only=True) for count in counts]
        ends = [-1 if cut else int(row.scored.argmax()) + row.answer_tokens for row in rows]
        return cls(rows, ends, sum(turn.bytes for turn in turns))


def _joined(scored: Sequence[_ScoredTurns], digest: str) -> Windows:
    rows = [row for turns in scored for row in turns.rows]
    counts = torch.tensor([len(turns.rows) for turns in scored])
    return Windows(
        tokens=[row.tokens.astype(np.int64) for row in rows],
        document=torch.repeat_interleave(counts),
        index=torch.cat([torch.arange(count) for count in counts.tolist()]),
        document_tokens=torch.tensor([sum(r.answer_tokens for r in t.rows) for t in scored]),
        document_bytes=torch.tensor([turns.bytes for turns in scored]),
        scored=[row.scored for row in rows],
        text_digest=digest,
        ends=torch.tensor([end for turns in scored for end in turns.ends]),
        filled=True,
    )
