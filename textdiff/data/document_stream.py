"""Documents that can be read again and again, a block at a time, and never lie in memory whole.

A document of a corpus may be larger than memory (one text file of many gigabytes is one document),
so documents travel as runs of blocks. Everything that reads a corpus passes over it this way: the
split, the tokenizer's training, the encoding.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from textdiff.data.encode import PIECE_CHARACTERS
from textdiff.data.python_docs import corpus_fingerprint
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
        tally: "Tally | None" = None,
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


# --- what is left out ---

EMPTY = "empty or only white space"


@dataclass
class Tally:
    """What one pass over documents leaves out.

    Attributes:
        skip: skip rows that cannot be used instead of refusing them.
        hint: the end of the sentence that refuses one.
        bad_rows: rows that were skipped.
        first: what was wrong with the first of them.
        files: files that were left out, by the reason.
    """

    skip: bool = False
    hint: str = ""
    bad_rows: int = 0
    first: str | None = None
    files: Counter[str] = field(default_factory=Counter)

    def restart(self) -> None:
        """Begins another pass."""
        self.bad_rows, self.first = 0, None
        self.files.clear()

    def bad_row(self, error: DataError) -> None:
        """Counts a row that cannot be used.

        Raises:
            DataError: what `error` says, where such rows are refused.
        """
        if not self.skip:
            raise DataError(f"{error}{self.hint}") from None
        self.bad_rows += 1
        self.first = self.first or str(error)


@dataclass(frozen=True)
class Omissions:
    """What a source leaves out of its documents.

    Attributes:
        files: files by the reason.
        bad_rows: rows that cannot be used, which were skipped on request.
        first_bad_row: what is wrong with the first of them.
    """

    files: Mapping[str, int] = field(default_factory=dict)
    bad_rows: int = 0
    first_bad_row: str | None = None

    @classmethod
    def of(cls, tally: Tally) -> "Omissions":
        """The account of the pass that was made last."""
        return cls(dict(tally.files), tally.bad_rows, tally.first)

    def with_files(self, files: Mapping[str, int]) -> "Omissions":
        """The same with files that were left out before anything was read."""
        return replace(self, files=dict(Counter(self.files) + Counter(files)))

    def sentences(self, name: str) -> list[str]:
        """A line about files and one about rows, where there are any."""
        lines = [f"{name}: left out {files_in_words(self.files)}"] if self.files else []
        if self.bad_rows:
            count = f"{self.bad_rows:,} bad row{'s' if self.bad_rows > 1 else ''}"
            lines.append(f"{name}: skipped {count}, the first one: {self.first_bad_row}")
        return lines


def files_in_words(files: Mapping[str, int]) -> str:
    """Numbers of files with their reasons, the most frequent reason first."""
    total = sum(files.values())
    ranked = sorted(files.items(), key=lambda reason: (-reason[1], reason[0]))
    parts = [f"{why}: {count:,}" for why, count in ranked]
    return f"{total:,} file{'s' if total > 1 else ''} ({', '.join(parts)})"


def no_text(where: str) -> DataError:
    """The error for a file or a data set without any text."""
    return DataError(
        f"{where}: holds no text (it is empty or only white space); give one that holds some"
    )


def blank(where: str) -> DataError:
    """The error for a folder or a pattern of files without any text."""
    return DataError(f"{where}: every document is {EMPTY}; give one that holds text")


def all_bad(where: str, tally: Tally) -> DataError:
    """The error for a source of which nothing is left when bad rows are skipped."""
    return DataError(
        f"{where}: holds no text that can be used: {tally.bad_rows:,} bad rows were skipped, the "
        f"first one: {tally.first}"
    )


def missing_column(where: str, column: str, present: Sequence[str] | Any) -> DataError:
    """The error for a column or key that is not there, listing those that are."""
    names = ", ".join(map(str, present)) or "none"
    return DataError(f"{where}: no column {column!r}; set text_column to one of: {names}")


def text_of(row: Mapping[str, Any], where: str, column: str) -> str:
    """Returns the text of a row.

    Raises:
        DataError: it has none, or something else in its place.
    """
    if column not in row:
        raise missing_column(where, column, row)
    return checked_text(row[column], where, column)


def checked_text(value: object, where: str, column: str) -> str:
    """Returns `value` if it is a string.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} holds {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {column!r} holds half of a surrogate pair, no text") from None
    return value


def parse_json(text: str) -> Any:
    """Returns the value that a JSON text holds; an integer too long for Python is infinite.

    Such an integer is valid JSON and mostly in a key that nobody reads.

    Raises:
        json.JSONDecodeError: the text is not valid JSON.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to convert integers of more than 4300 digits
        return _LENIENT.decode(text)


def _infinite_if_long(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return -math.inf if digits.startswith("-") else math.inf


_LENIENT = json.JSONDecoder(parse_int=_infinite_if_long)


def parse_json_prefix(text: str, start: int) -> tuple[Any, int]:
    """Returns the JSON value that begins at `start`, and where it ends.

    Raises:
        json.JSONDecodeError: there is no valid one.
        RecursionError: it is nested too deeply.
    """
    return _LENIENT.raw_decode(text, start)
