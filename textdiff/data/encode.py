"""Text to token ids, the same way in training and in evaluation.

`Encoder` differs from calling the tokenizer in three points: text never becomes a special token,
not even where it spells one; truncation and padding that a tokenizer file may carry are off; and a
long document is encoded in pieces, which bounds memory.
"""

import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from textdiff.errors import DataError

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
        self._bytes = _byte_ids(serialized)

    def __call__(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Returns the token ids of every document, int32 [tokens] each."""
        if self._bytes is not None:
            return [self._bytes[np.frombuffer(text.encode(), np.uint8)] for text in texts]
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
    return Encoder(serialize(tokenizer))(documents)


def serialize(tokenizer: PreTrainedTokenizerFast) -> str:
    """The backend as JSON, without the truncation and padding that calls may have left in it."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())


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


def byte_characters() -> list[str]:
    """The printable stand-ins of `pre_tokenizers.ByteLevel`, indexed by byte.

    Printable Latin-1 characters stand for themselves, the other bytes take the code points from
    256 on in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b if b in printable else 256 + others.index(b)) for b in range(256)]


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
