"""Text to token ids, the same way in training and in evaluation.

`Encoder` differs from calling the tokenizer in three points: text never becomes a special token,
not even where it spells one; truncation and padding that a tokenizer file may carry are off; and a
long document is encoded in pieces, which bounds memory.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

PIECE_CHARACTERS = 1_000_000
_GROUP_CHARACTERS = 2_000_000  # an encoding takes some hundred bytes per token until it is read


class Encoder:
    """Encodes documents with a private copy of a tokenizer's backend.

    Args:
        serialized: the backend as JSON, from `serialize`; a string, so that it can be handed to
            other processes.
    """

    def __init__(self, serialized: str) -> None:
        self._backend = Tokenizer.from_str(serialized)
        self._backend.encode_special_tokens = True

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Returns the token ids of every document, int32 [tokens] each."""
        parts: list[list[NDArray[np.int32]]] = [[] for _ in texts]
        group: list[tuple[int, str]] = []
        size = 0
        for index, text in enumerate(texts):
            for piece in split_long(text):
                group.append((index, piece))
                size += len(piece)
                if size >= _GROUP_CHARACTERS:
                    self._encode(group, parts)
                    group, size = [], 0
        self._encode(group, parts)
        return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]

    def _encode(self, group: list[tuple[int, str]], parts: list[list[NDArray[np.int32]]]) -> None:
        pieces = [piece for _, piece in group]
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        for (index, _), encoding in zip(group, encodings, strict=True):
            parts[index].append(np.asarray(encoding.ids, dtype=np.int32))


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> list[NDArray[np.int32]]:
    """Encodes documents without adding or recognising any special token.

    Args:
        tokenizer: any fast tokenizer; it is not changed.
        texts: the documents.

    Returns:
        One array of ids per document, int32 [tokens].
    """
    return Encoder(serialize(tokenizer))(list(texts))


def serialize(tokenizer: PreTrainedTokenizerFast) -> str:
    """The backend as JSON, without the truncation and padding that calls may have left in it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


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
