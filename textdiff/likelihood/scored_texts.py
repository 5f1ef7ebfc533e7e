"""Scored windows of texts, also where only a part of each text is scored.

A document is a row of pieces, each scored or fixed. Pieces are encoded one by one, so that a
piece's tokens do not depend on its neighbours: leave the space between a prompt and its answer
where the answer's tokens should have it. What a tokenizer does to the beginning of a text applies
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

from textdiff.data.losses import Encoded, Loss, encode_checked
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.windows import Scored, Windows, cut_windows

Piece = tuple[str, bool]
"""A text, and whether it is scored (True) or fixed (False)."""

_log = logging.getLogger(__name__)

Span = tuple[int, int]
"""First character and the one after the last."""


def scored_pieces(
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    spans: Sequence[Sequence[Span]] | None = None,
) -> list[list[Piece]]:
    """Return documents in pieces: all scored, or after prompts, or in spans.

    Raises:
        ConfigError: both prompts and spans.
        DataError: see `prompted` and `spanned`.
    """
    if prompts is not None and spans is not None:
        raise ConfigError(
            "prompts and spans exclude each other; give one of them", code="prompts_and_spans"
        )
    if prompts is not None:
        return prompted(prompts, texts)
    return [[(text, True)] for text in texts] if spans is None else spanned(texts, spans)


def prompted(prompts: Sequence[str], texts: Sequence[str]) -> list[list[Piece]]:
    """Return documents whose prompts are fixed and whose texts are scored.

    Raises:
        DataError: not as many prompts as texts.
    """
    if len(prompts) != len(texts):
        raise DataError(
            f"{len(prompts)} prompts for {len(texts)} texts; give one for each",
            code="not_one_prompt_each",
        )
    return [[(prompt, False), (text, True)] for prompt, text in zip(prompts, texts, strict=True)]


def spanned(texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[list[Piece]]:
    """Return documents of which only some spans are scored; everything around them is fixed.

    Args:
        texts: the documents.
        spans: spans of each document in characters, in order and without overlap.

    Raises:
        DataError: spans out of range or out of order, or not as many lists as texts.
    """
    if len(spans) != len(texts):
        raise DataError(
            f"{len(spans)} lists of spans for {len(texts)} texts; give one for each",
            code="not_one_list_each",
        )
    documents: list[list[Piece]] = []
    for number, (text, wanted) in enumerate(zip(texts, spans, strict=True), start=1):
        edges = [edge for span in wanted for edge in span]
        inside = not edges or (edges[0] >= 0 and edges[-1] <= len(text))
        if not inside or any(a > b for a, b in pairwise(edges)):
            raise DataError(
                f"document {number}: spans {[list(span) for span in wanted]} must be in order "
                f"within its {len(text)} characters",
                code="spans_out_of_order",
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
    """Encode documents in pieces and cut them into windows.

    Args:
        tokenizer: the model's.
        documents: pieces of each document.
        length: the model's sequence length in tokens.
        clean: [V] bool, ids that the model can predict.
        stride: see `cut_windows`.
        end: see `cut_windows`.

    Raises:
        ConfigError: a stride out of range.
        DataError: nothing to score, foreign tokens, or fixed pieces that a window would not read.
    """
    encoded = _encoded(tokenizer, documents)
    ids, masks, rest = [], [], iter(encoded.ids)
    for pieces in documents:
        encodings = [next(rest) for _ in pieces]
        ids.append(np.concatenate(encodings))
        marks = [np.full(len(x), scored) for x, (_, scored) in zip(encodings, pieces, strict=True)]
        masks.append(np.concatenate(marks))
    if stride is None:
        _refuse_hidden_context(masks, length, end)
    texts = ["".join(text for text, scored in pieces if scored) for pieces in documents]
    losses = _scored_losses(documents, encoded)
    unknown = encoded.unknown if any(loss.unknown for loss in encoded.losses.values()) else None
    if unknown is not None and clean[unknown]:  # else it is refused, as foreign tokens are
        masks = [mask & (tokens != unknown) for tokens, mask in zip(ids, masks, strict=True)]
        if end is None and not any(mask.any() for mask in masks):
            raise _all_unknown(losses)
    windows = cut_windows(ids, texts, length, clean, stride=stride, scored=masks, end=end)
    return replace(windows, losses=losses, unknown=unknown)


def _all_unknown(losses: dict[int, Loss]) -> DataError:
    first = min(losses, default=0)
    return DataError(
        f"the tokenizer cannot encode the text: all its tokens are unknown (document {first + 1}: "
        f"{losses[first] if losses else ''}); score it by another model",
        code="all_tokens_unknown",
    )


def _refuse_hidden_context(masks: Sequence[Scored], length: int, end: int | None) -> None:
    """Refuse documents whose fixed text later windows would not read."""
    for number, mask in enumerate(masks, start=1):
        count = len(mask) + (end is not None)
        if count > length and not mask.all():
            fixed = "its fixed text" if end is None else "its fixed text and its end"
            raise DataError(
                f"document {number} has {count} tokens with {fixed}, more than the model's context "
                f"of {length}: later windows would not read it; shorten it, or give a stride",
                code="context_too_long",
            )


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
    """Return by document what its scored pieces lose, and report what fixed ones do.

    A prompt that loses a part of its text is another condition; the bound conditional on it holds.
    """
    owners = [(d, scored) for d, pieces in enumerate(documents) for _, scored in pieces]
    losses: dict[int, Loss] = {}
    fixed: dict[int, Loss] = {}
    for piece, loss in encoded.losses.items():
        document, scored = owners[piece]
        of_kind = losses if scored else fixed
        before = of_kind.get(document)
        unknown = loss.unknown + (before.unknown if before else 0)
        of_kind[document] = replace(before or loss, unknown=unknown)
    if fixed:
        first = min(fixed)
        _log.warning(
            "the model does not read the fixed text of %d document(s) as it is written, since its "
            "tokenizer loses a part: in document %d %s",
            len(fixed),
            first + 1,
            fixed[first],
        )
    return losses
