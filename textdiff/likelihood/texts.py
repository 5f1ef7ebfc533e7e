"""From texts to scored windows, also where only a part of each text is scored.

A document is a row of pieces, each scored or given. Pieces are encoded one by one, so that a
piece's tokens do not depend on its neighbours: leave the space between a prompt and its answer
where the answer's tokens should have it.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import encode_documents
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.protocols import Windows, cut_windows

Piece = tuple[str, bool]
"""A text, and whether it is scored (True) or given (False)."""

Span = tuple[int, int]
"""First character and the one after the last."""


def pieces_of(
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    spans: Sequence[Sequence[Span]] | None = None,
) -> list[list[Piece]]:
    """Documents in pieces: all scored, or after prompts, or in spans.

    Raises:
        ConfigError: both prompts and spans.
        DataError: see `prompted` and `spanned`.
    """
    if prompts is not None and spans is not None:
        raise ConfigError("prompts and spans exclude each other; give one of them")
    if prompts is not None:
        return prompted(prompts, texts)
    return [[(text, True)] for text in texts] if spans is None else spanned(texts, spans)


def prompted(prompts: Sequence[str], texts: Sequence[str]) -> list[list[Piece]]:
    """Documents whose prompts are given and whose texts are scored.

    Raises:
        DataError: not as many prompts as texts.
    """
    if len(prompts) != len(texts):
        raise DataError(f"{len(prompts)} prompts for {len(texts)} texts; give one for each")
    return [[(prompt, False), (text, True)] for prompt, text in zip(prompts, texts, strict=True)]


def spanned(texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[list[Piece]]:
    """Documents of which only some spans are scored; everything around them is given.

    Args:
        texts: the documents.
        spans: spans of each document in characters, in order and without overlap.

    Raises:
        DataError: spans out of range or out of order, or not as many lists as texts.
    """
    if len(spans) != len(texts):
        raise DataError(f"{len(spans)} lists of spans for {len(texts)} texts; give one for each")
    documents: list[list[Piece]] = []
    for number, (text, wanted) in enumerate(zip(texts, spans, strict=True), start=1):
        edges = [edge for span in wanted for edge in span]
        inside = not edges or (edges[0] >= 0 and edges[-1] <= len(text))
        if not inside or any(a > b for a, b in pairwise(edges)):
            raise DataError(
                f"document {number}: spans {[list(span) for span in wanted]} must lie in order "
                f"within its {len(text)} characters"
            )
        cuts = [0, *edges, len(text)]
        documents.append([(text[a:b], i % 2 == 1) for i, (a, b) in enumerate(pairwise(cuts))])
    return documents


def windows_of(
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Sequence[Piece]],
    length: int,
    clean: Tensor,
    stride: int | None = None,
    end: int | None = None,
) -> Windows:
    """Encodes documents in pieces and cuts them into windows.

    Args:
        tokenizer: the model's.
        documents: pieces of each document.
        length: the model's sequence length in tokens.
        clean: [V] bool, ids that the model can predict.
        stride: see `cut_windows`.
        end: see `cut_windows`.

    Raises:
        ConfigError: a stride out of range.
        DataError: nothing to score, tokens outside the vocabulary, or a document with given pieces
            that is longer than a window and has no stride to carry them along.
    """
    flat = encode_documents(tokenizer, [text for pieces in documents for text, _ in pieces])
    ids, masks, start = [], [], 0
    for pieces in documents:
        mine = flat[start : start + len(pieces)]
        start += len(pieces)
        ids.append(np.concatenate(mine))
        marks = [np.full(len(x), scored) for x, (_, scored) in zip(mine, pieces, strict=True)]
        masks.append(np.concatenate(marks))
    for number, (tokens, mask) in enumerate(zip(ids, masks, strict=True), start=1):
        count = len(tokens) + (end is not None)
        if stride is None and count > length and not mask.all():
            given = "what is given" if end is None else "what is given and its end"
            raise DataError(
                f"document {number} has {count} tokens with {given}, more than the model's context "
                f"of {length}: later windows would not see it; shorten it, or give a stride"
            )
    texts = ["".join(text for text, scored in pieces if scored) for pieces in documents]
    return cut_windows(ids, texts, length, clean, stride=stride, scored=masks, end=end)
