"""From texts to scored windows, also where only a part of each text is scored.

A document is a row of pieces, each scored or given. Pieces are encoded one by one, so that a
piece's tokens do not depend on its neighbours: leave the space between a prompt and its answer
where the answer's tokens should have it. What a tokenizer does to the beginning of a text it does
to the first of them alone.

Unknown tokens stand in their windows and are not scored: no probability of them is one of a text.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.data import Encoded, Loss, encode_checked
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.windows import Windows, cut_windows

Piece = tuple[str, bool]
"""A text, and whether it is scored (True) or given (False)."""

_log = logging.getLogger(__name__)

Span = tuple[int, int]
"""First character and the one after the last."""


def scored_pieces(
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
    encoded = _encoded(tokenizer, documents)
    ids, masks, start = [], [], 0
    for pieces in documents:
        mine = encoded.ids[start : start + len(pieces)]
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
    losses = _scored_losses(documents, encoded)
    unknown = encoded.unknown if any(loss.unknown for loss in encoded.losses.values()) else None
    if unknown is not None and clean[unknown]:  # else it is refused, as foreign tokens are
        masks = [mask & (tokens != unknown) for tokens, mask in zip(ids, masks, strict=True)]
        if end is None and not any(mask.any() for mask in masks):
            first = min(losses, default=0)
            raise DataError(
                f"the tokenizer knows nothing of the text: all its tokens are unknown (document "
                f"{first + 1}: {losses[first] if losses else ''}); score it by another model"
            )
    windows = cut_windows(ids, texts, length, clean, stride=stride, scored=masks, end=end)
    return replace(windows, losses=losses, unknown=unknown)


def _encoded(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Sequence[Piece]]) -> Encoded:
    """Encode all pieces; those after a text's beginning as text that goes on."""
    later = []
    for pieces in documents:
        begun = False
        for text, _ in pieces:
            later.append(begun)
            begun = begun or bool(text)
    return encode_checked(tokenizer, [text for pieces in documents for text, _ in pieces], later)


def _scored_losses(documents: Sequence[Sequence[Piece]], encoded: Encoded) -> dict[int, Loss]:
    """Return by document what its scored pieces lose, and report what given ones do.

    A prompt that is not seen as it is written is another condition; the bound given it holds.
    """
    owners = [(d, scored) for d, pieces in enumerate(documents) for _, scored in pieces]
    losses: dict[int, Loss] = {}
    given: dict[int, Loss] = {}
    for piece, loss in encoded.losses.items():
        document, scored = owners[piece]
        found = losses if scored else given
        before = found.get(document)
        unknown = loss.unknown + (before.unknown if before else 0)
        found[document] = replace(before or loss, unknown=unknown)
    if given:
        first = min(given)
        _log.warning(
            "the model does not see what is given of %d document(s) as it is written, since its "
            "tokenizer loses a part: in document %d %s",
            len(given),
            first + 1,
            given[first],
        )
    return losses
