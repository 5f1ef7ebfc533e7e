"""Scored windows of conversations: every answer given all that came before it.

A conversation is a document and each of its turns a window, laid out as training lays it out. The
end-of-text token of an answer and the fill of its last block are scored and not counted. The bound
is one on the probability of the answer, its end and the fill together, and so on the answer's.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from textdiff.data.answer_layout import RowLayout, Written
from textdiff.data.answers import TurnEncoder
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
        DataError: a conversation cannot be encoded or is too long; or none is left.
    """
    encoder = TurnEncoder(tokenizer)
    layout = RowLayout(length, block_size, encoder.end)
    scored = list(_scored(encoder, layout, documents, too_long))
    if not scored:
        raise DataError(
            f"every conversation is longer than {length} tokens, the model's sequence length",
            code="all_too_long",
        )
    turns, ends, sizes = zip(*scored, strict=True)
    rows = [row for each in turns for row in each]
    return Windows(
        tokens=[row.tokens.astype(np.int64) for row in rows],
        document=torch.repeat_interleave(torch.tensor([len(each) for each in turns])),
        index=torch.cat([torch.arange(len(each)) for each in turns]),
        document_tokens=torch.tensor([sum(row.answer_tokens for row in each) for each in turns]),
        document_bytes=torch.tensor(sizes),
        scored=[row.scored for row in rows],
        text_digest=hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        ends=torch.tensor([end for each in ends for end in each]),
        filled=True,
    )


def _scored(
    encoder: TurnEncoder, layout: RowLayout, documents: Sequence[str], too_long: str
) -> Iterator[tuple[list[Written], list[int], int]]:
    """Yield the rows of each conversation's answers, the places of their ends, and their bytes."""
    for number, document in enumerate(documents, start=1):
        where = f"conversation {number}"
        turns = encoder(document, where)
        kept = layout.fit([(len(turn.prompt), len(turn.answer)) for turn in turns], too_long, where)
        if kept is None:
            continue
        pairs = [(turn.prompt, turn.answer) for turn in turns[: kept.turns]]
        counts = range(1, len(pairs) + 1)
        rows = [layout.write(pairs[:count], kept.cut, last_only=True) for count in counts]
        ends = [-1 if kept.cut else int(row.scored.argmax()) + row.answer_tokens for row in rows]
        yield rows, ends, sum(turn.bytes for turn in turns[: kept.turns])
