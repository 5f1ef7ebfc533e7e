"""TextSet to measure: sampled, read from a file, or cut from real ones."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textdiff.data.losses import encode_checked
from textdiff.errors import DataError
from textdiff.pipeline import TextDiffusion

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSet:
    """T texts in the tokens of one model.

    Attributes:
        texts: as a reader gets them.
        tokens: ids of each text, its end-of-text token left out.
        ended: whether each text came to its end-of-text token; None: unknown.
    """

    texts: list[str]
    tokens: list[list[int]]
    ended: list[bool] | None = None

    def __post_init__(self) -> None:
        if not any(self.tokens):
            raise DataError(
                "there is no text to measure: all of them are empty", code="all_texts_empty"
            )

    def __len__(self) -> int:
        return len(self.texts)


def of_sequences(model: TextDiffusion, sequences: Sequence[Sequence[int]]) -> TextSet:
    """Return rows of tokens as texts, each up to its first end-of-text token.

    Args:
        model: decodes them.
        sequences: token ids of each row.
    """
    end = model.tokenizer.eos_token_id
    ended = [end in ids for ids in sequences]
    rows = [
        list(ids[: list(ids).index(end)] if done else ids)
        for ids, done in zip(sequences, ended, strict=True)
    ]
    return TextSet([model.decode(ids) for ids in rows], rows, ended)


def text_set_of(model: TextDiffusion, texts: Sequence[str]) -> TextSet:
    """TextSet from elsewhere, in the model's tokens.

    Raises:
        DataError: no text, or characters that the tokenizer does not know.
    """
    return TextSet(list(texts), [ids.tolist() for ids in _encoded(model, texts)])


def real_pieces(
    model: TextDiffusion, documents: Sequence[str], length: int, count: int, least: int = 0
) -> tuple[TextSet, TextSet | None]:
    """Return real texts cut as sampled rows are.

    As in training the documents are joined, an end-of-text token after each, and cut into rows of
    `length` tokens; like a sampled row each is then read up to its first end-of-text token.

    Args:
        model: its tokenizer encodes, decodes and ends documents.
        documents: real texts.
        length: tokens per row.
        count: rows wanted, taken evenly over all.
        least: tokens that a row must have before its end, as samples must: others are passed over.

    Returns:
        `count` pieces, and as many others if there are enough rows, to compare the first with.

    Raises:
        DataError: fewer than `count` rows, or characters that the tokenizer does not know.
    """
    end = model.tokenizer.eos_token_id
    after = np.array([] if end is None else [end], dtype=np.int64)
    pieces = [piece for ids in _encoded(model, documents) for piece in (ids, after)]
    stream = np.concatenate([*pieces, np.zeros(0, dtype=np.int64)])
    cut = stream[: len(stream) // length * length].reshape(-1, length)
    cut = cut[~(cut[:, :least] == end).any(1)] if end is not None else cut
    rows = len(cut)
    if rows < count:
        raise DataError(
            f"the reference has {len(stream):,} tokens, {rows} pieces of {length}"
            + (f" with no end among their first {least}" if least else "")
            + f", and {count} are needed to stand beside the samples; give more text, or fewer or "
            "shorter samples",
            code="too_little_reference",
        )
    sets = 2 if rows >= 2 * count else 1
    places = np.linspace(0, rows, sets * count, endpoint=False).astype(np.int64)
    first, *others = (of_sequences(model, cut[places[s::sets]].tolist()) for s in range(sets))
    return first, others[0] if others else None


def _encoded(model: TextDiffusion, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids of texts.

    Raises:
        DataError: characters that the tokenizer does not know.
    """
    clean = model.family.process.vocabulary.clean.cpu().numpy()
    encoded = encode_checked(model.tokenizer, texts)
    for number, (text, ids) in enumerate(zip(texts, encoded.ids, strict=True), start=1):
        if not clean[ids].all():
            raise DataError(
                f"text {number} ({text!r:.40}) has characters that the model's tokenizer was not "
                "trained on; measure with a model that was"
            )
    if encoded.losses:
        number, loss = next(iter(encoded.losses.items()))
        _log.warning(
            "the model's tokens do not give %d of %d texts back (in text %d %s): figures of tokens "
            "are of what they give back",
            len(encoded.losses),
            len(texts),
            number + 1,
            loss,
        )
    return encoded.ids
