"""Text to token ids, the same way in training and in evaluation.

`Encoder` differs from calling the tokenizer in three points: text never becomes a special token,
not even where it spells one; truncation and padding that a tokenizer file may carry are off; and a
long document is encoded in pieces, which bounds memory, and of which only the first one begins it.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.data.backend import TextBackends, byte_characters, serialize, text_backends
from textdiff.errors import DataError, first_line

__all__ = ["Encoder", "Ids", "byte_characters", "encode_documents", "serialize", "split_long"]

Ids = NDArray[np.int32]

PIECE_CHARACTERS = 1_000_000
_GROUP_CHARACTERS = 2_000_000  # an encoding takes some hundred bytes per token until it is read


class Encoder:
    """Encodes documents with a private copy of a tokenizer's backend.

    Args:
        first: the backend as JSON, from `text_backends`; a string, so that it can be handed to
            other processes.
        later: the backend for text that goes on; None: the same.
    """

    def __init__(self, first: str, later: str | None = None) -> None:
        self._bytes = _byte_ids(first)
        self._first = _backend(first)
        self._later = self._first if later in (None, first) else _backend(later)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "Encoder":
        """Make the encoder of a tokenizer."""
        return encoder_of(text_backends(tokenizer))

    def __call__(self, texts: Sequence[str], later: Iterable[bool] = repeat(False)) -> list[Ids]:
        """Return the token ids of every text, int32 [tokens] each.

        Args:
            texts: whole documents, or pieces of them.
            later: whether each goes on from a piece before it.

        Raises:
            DataError: the tokenizer fails at a text.
        """
        if self._bytes is not None:
            return [self._bytes[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        parts: list[list[Ids]] = [[] for _ in texts]
        group: list[tuple[int, str, bool]] = []
        size = 0
        for index, (text, goes_on) in enumerate(zip(texts, later, strict=False)):
            for piece in split_long(text):
                group.append((index, piece, goes_on))
                goes_on, size = True, size + len(piece)
                if size >= _GROUP_CHARACTERS:
                    self._encode(group, parts)
                    group, size = [], 0
        self._encode(group, parts)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def _encode(self, group: list[tuple[int, str, bool]], parts: list[list[Ids]]) -> None:
        # A document's first piece comes before the others, here too.
        for backend, later in ((self._first, False), (self._later, True)):
            chosen = [(index, piece) for index, piece, goes_on in group if goes_on == later]
            encoded = self._ids(backend, [piece for _, piece in chosen])
            for (index, _), ids in zip(chosen, encoded, strict=True):
                parts[index].append(ids)

    @staticmethod
    def _ids(backend: Tokenizer, pieces: list[str]) -> Iterator[Ids]:
        try:
            encodings = backend.encode_batch_fast(pieces, add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(
                f"the tokenizer cannot encode the text ({first_line(error)}); train with a byte "
                "or bpe tokenizer, or choose one that has an unknown token"
            ) from None
        return (np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings)


@lru_cache(maxsize=4)
def encoder_of(backends: TextBackends) -> Encoder:
    """Make an encoder; the last ones are kept."""
    return Encoder(*backends)


def _backend(serialized: str) -> Tokenizer:
    backend = Tokenizer.from_str(serialized)
    backend.encode_special_tokens = True
    return backend


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> list[NDArray[np.int32]]:
    """Encodes documents without adding or recognising any special token.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        texts: the documents.

    Returns:
        One array of ids per document, int32 [tokens].

    Raises:
        DataError: half of a surrogate pair, which no tokenizer can read.
    """
    return Encoder.of(tokenizer)(readable(texts))


def readable(texts: Iterable[str]) -> list[str]:
    """Return texts that can be encoded.

    Raises:
        DataError: half of a surrogate pair, which no tokenizer can read.
    """
    documents = list(texts)
    for text in documents:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text {text[:40]!a} has half of a surrogate pair as character "
                f"{error.start + 1}, which no tokenizer can read; remove it"
            ) from None
    return documents


def _byte_ids(serialized: str) -> NDArray[np.int32] | None:
    """The id of every byte, [256], if the tokenizer does nothing but look up bytes; else None.

    A merge-free BPE goes through the motions of merging, some hundred times slower than a table.
    """
    settings = json.loads(serialized)
    model = settings["model"]
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    looks_up = (
        model["type"] == "BPE"
        and not model["merges"]
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and settings["normalizer"] is None
        and plain.items() <= (settings["pre_tokenizer"] or {}).items()
        and all(token["special"] for token in settings["added_tokens"])
    )
    names = byte_characters()
    if not looks_up or not set(names) <= model["vocab"].keys():
        return None
    return np.array([model["vocab"][name] for name in names], dtype=np.int32)


def split_long(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yields `text` in pieces of at most `limit` characters that end after a newline if they can.

    The empty text is one empty piece.
    """
    start = 0
    while len(text) - start > limit:
        newline = text.rfind("\n", start, start + limit)
        stop = newline + 1 if newline >= 0 else start + limit
        yield text[start:stop]
        start = stop
    yield text[start:]
