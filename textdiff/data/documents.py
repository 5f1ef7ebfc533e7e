"""Documents that can be read again and again, a block at a time, and never lie in memory whole.

A document of a corpus may be larger than memory (one text file of many gigabytes is one document),
so documents travel as runs of blocks. Everything that reads a corpus passes over it this way: the
split, the tokenizer's training, the encoding.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from textdiff.data.encode import PIECE_CHARACTERS
from textdiff.data.python_docs import corpus_fingerprint
from textdiff.data.rows import Tally
from textdiff.errors import DataError


class Block(NamedTuple):
    """A part of a document.

    Attributes:
        text: its characters.
        last: whether the document ends here.
    """

    text: str
    last: bool


class Documents:
    """A corpus, read anew by every pass.

    Attributes:
        signature: changes when the documents may have changed; cheap where it can be (of files it
            is the times and sizes, of a dataset its fingerprint).
        size: bytes of the files as they lie on disk, for a progress bar; None where unknown.
        tally: what the last pass left out.
        left_out: numbers of files that are not read, by the reason.

    Args:
        read: yields the blocks of every document in order, the same ones on every call.
        signature: see above.
        size: see above.
        tally: see above.
        left_out: see above.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Block]],
        signature: str,
        size: int | None = None,
        tally: Tally | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self._read = read
        self.signature = signature
        self.size = size
        self.tally = tally or Tally()
        self.left_out = left_out or {}

    def blocks(self) -> Iterator[Block]:
        """Yields every document's blocks in order.

        Raises:
            DataError: a place in the corpus holds no usable text.
        """
        return self._read()

    def pieces(self, limit: int = PIECE_CHARACTERS) -> Iterator[Block]:
        """Yields the blocks cut as `split_long` cuts whole documents."""
        return cut_blocks(self._read(), limit)


def from_texts(texts: Iterable[str]) -> Documents:
    """Documents that lie in memory."""
    held = list(texts)
    return Documents(lambda: (Block(text, True) for text in held), corpus_fingerprint(held))


def join(parts: Sequence[Documents]) -> Documents:
    """Corpora one after another."""
    if len(parts) == 1:
        return parts[0]
    signature = hashlib.sha256(" ".join(part.signature for part in parts).encode()).hexdigest()
    sizes = [part.size for part in parts if part.size is not None]
    return Documents(
        lambda: (block for part in parts for block in part.blocks()),
        signature,
        sum(sizes) if len(sizes) == len(parts) else None,
    )


def section(documents: Documents, skip: int, limit: int | None) -> Documents:
    """The documents from number `skip` on, at most `limit` of them."""

    def read() -> Iterator[Block]:
        number = 0
        for block in documents.blocks():
            if number >= skip:
                yield block
            number += block.last
            if limit is not None and number >= skip + limit:
                return
        if number <= skip:
            raise DataError(f"skip_documents {skip} leaves nothing of {number} documents")

    signature = f"{documents.signature} {skip} {limit}"
    return Documents(read, signature, None, documents.tally, documents.left_out)


def iterate_texts(documents: Documents) -> Iterator[str]:
    """Yields whole documents: for those that are known to fit into memory."""
    return whole_texts(documents.blocks())


def whole_texts(blocks: Iterable[Block]) -> Iterator[str]:
    """Yields the documents that blocks make up."""
    parts: list[str] = []
    for text, last in blocks:
        parts.append(text)
        if last:
            yield "".join(parts) if len(parts) > 1 else text
            parts = []


def cut_blocks(blocks: Iterable[Block], limit: int) -> Iterator[Block]:
    """Yields the same documents in pieces of at most `limit` characters.

    The pieces of a document are those of `split_long`, however it came in: they end after a newline
    where they can.
    """
    held = ""
    for text, last in blocks:
        held = held + text if held else text
        start = 0
        while len(held) - start > limit:
            newline = held.rfind("\n", start, start + limit)
            stop = newline + 1 if newline >= 0 else start + limit
            yield Block(held[start:stop], False)
            start = stop
        held = held[start:] if start else held
        if last:
            yield Block(held, True)
            held = ""
