"""Documents that can be read again and again, a block at a time, never whole in memory.

A document of a corpus may be larger than memory: one text file of many gigabytes is one document.
Documents therefore travel as runs of blocks. Everything that reads a corpus passes over it this
way: the split, the tokenizer's training, the encoding.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from textdiff.errors import DataError, first_line

PIECE_CHARACTERS = 1_000_000
EMPTY = "empty or only white space"


class TextBlock(NamedTuple):
    """A part of a document.

    Attributes:
        text: its characters.
        last: whether the document ends here.
    """

    text: str
    last: bool


@dataclass
class Omissions:
    """Account of what one pass over documents leaves out.

    Attributes:
        skip: skip rows that cannot be used instead of refusing them.
        hint: the end of the sentence that refuses one.
        unread: numbers of files that are never read, by the reason.
        files: numbers of files that turned out to hold no text, by the reason.
        bad_rows: rows that were skipped.
        first_bad_row: the reason of the first of them.
    """

    skip: bool = False
    hint: str = ""
    unread: Mapping[str, int] = field(default_factory=dict)
    files: Counter[str] = field(default_factory=Counter)
    bad_rows: int = 0
    first_bad_row: str | None = None

    def restart(self) -> None:
        """Begin another pass."""
        self.files.clear()
        self.bad_rows, self.first_bad_row = 0, None

    def usable(self, read: Callable[..., str], *arguments: Any) -> str:
        """Return the text that a function reads off a row; of a bad row the empty string.

        Raises:
            DataError: the same error with the hint, where such rows are refused.
        """
        try:
            return read(*arguments)
        except DataError as error:
            if not self.skip:
                raise DataError(f"{error}{self.hint}", code=error.code) from None
            self.bad_rows += 1
            self.first_bad_row = self.first_bad_row or str(error)
            return ""

    def record(self) -> dict[str, Any]:
        """Return what the last pass left out, as plain data."""
        return {
            "files": dict(self.files),
            "bad_rows": self.bad_rows,
            "first_bad_row": self.first_bad_row,
        }

    def joined(self) -> "Omissions":
        """Return the same with all files in `files`."""
        files = Counter(self.files) + Counter(self.unread)
        return replace(self, unread={}, files=files)

    def sentences(self, name: str) -> list[str]:
        """Return a line about files and one about rows, where there are any."""
        files = self.joined().files
        lines = [f"{name}: left out {files_in_words(files)}"] if files else []
        if self.bad_rows:
            count = f"{self.bad_rows:,} bad row{'s' if self.bad_rows > 1 else ''}"
            lines.append(f"{name}: skipped {count}, the first one: {self.first_bad_row}")
        return lines


@dataclass
class Documents:
    """A corpus, read anew by every pass.

    Attributes:
        blocks: yields the blocks of every document in order, the same ones on every call; raises
            `DataError` where a place in the corpus holds no usable text.
        signature: changes when the documents may have changed; cheap where it can be (of files it
            is the times and sizes, of a dataset its fingerprint).
        size: bytes of the files on disk, for a progress bar; None where unknown.
        omissions: what the last pass left out.
        known_bytes: bytes of text as far as they are known before reading; 0 where they are not.
    """

    blocks: Callable[[], Iterator[TextBlock]]
    signature: str
    size: int | None = None
    omissions: Omissions = field(default_factory=Omissions)
    known_bytes: int = 0

    def pieces(self, limit: int = PIECE_CHARACTERS) -> Iterator[TextBlock]:
        """Yield the blocks cut as `split_long` cuts whole documents."""
        return cut_blocks(self.blocks(), limit)


def from_texts(texts: Iterable[str]) -> Documents:
    """Return documents that are in memory."""
    held = list(texts)
    return Documents(lambda: (TextBlock(text, True) for text in held), corpus_fingerprint(held))


def corpus_fingerprint(texts: Iterable[str]) -> str:
    """Return the hexadecimal SHA-256 of the SHA-256 of every document's UTF-8 bytes.

    Any change of content, order or boundaries shows in it.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def join(corpora: Sequence[Documents]) -> Documents:
    """Return corpora one after another as one."""
    if len(corpora) == 1:
        return corpora[0]
    signatures = " ".join(corpus.signature for corpus in corpora)
    sizes = [corpus.size for corpus in corpora if corpus.size is not None]
    return Documents(
        lambda: (block for corpus in corpora for block in corpus.blocks()),
        hashlib.sha256(signatures.encode()).hexdigest(),
        sum(sizes) if len(sizes) == len(corpora) else None,
    )


def section(documents: Documents, skip: int, limit: int | None) -> Documents:
    """Return the documents from number `skip` on, at most `limit` of them."""

    def read() -> Iterator[TextBlock]:
        number = 0
        for block in documents.blocks():
            if number >= skip:
                yield block
            number += block.last
            if limit is not None and number >= skip + limit:
                return
        if number <= skip:
            raise DataError(
                f"skip_documents {skip} leaves nothing of {number} documents", code="no_documents"
            )

    signature = f"{documents.signature} {skip} {limit}"
    known = documents.known_bytes if limit is None else 0
    return Documents(read, signature, omissions=documents.omissions, known_bytes=known)


def iterate_texts(documents: Documents) -> Iterator[str]:
    """Yield whole documents: for those that are known to fit into memory."""
    return whole_texts(documents.blocks())


def whole_texts(blocks: Iterable[TextBlock]) -> Iterator[str]:
    """Yield the documents that blocks make up."""
    pieces: list[str] = []
    for text, last in blocks:
        pieces.append(text)
        if last:
            yield "".join(pieces) if len(pieces) > 1 else text
            pieces = []


def split_long(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield `text` in pieces of at most `limit` characters that end after a newline if they can.

    The empty text is one empty piece.
    """
    return (piece for piece, _ in cut_blocks([TextBlock(text, True)], limit))


def cut_blocks(blocks: Iterable[TextBlock], limit: int) -> Iterator[TextBlock]:
    """Yield the same documents in pieces of at most `limit` characters, however they came in.

    Pieces end after a newline where they can.
    """
    held = ""
    for text, last in blocks:
        held = held + text if held else text
        start = 0
        while len(held) - start > limit:
            newline = held.rfind("\n", start, start + limit)
            stop = newline + 1 if newline >= 0 else start + limit
            yield TextBlock(held[start:stop], False)
            start = stop
        held = held[start:] if start else held
        if last:
            yield TextBlock(held, True)
            held = ""


# --- errors of readers ---------------------------------------------------------------------------


def brief(error: Exception) -> str:
    """Return another library's error as a part of a sentence."""
    return first_line(error).rstrip(".:")[:160]


def files_in_words(files: Mapping[str, int]) -> str:
    """Return numbers of files with their reasons, the most frequent reason first."""
    total = sum(files.values())
    ranked = sorted(files.items(), key=lambda reason: (-reason[1], reason[0]))
    reasons = ", ".join(f"{why}: {count:,}" for why, count in ranked)
    return f"{total:,} file{'s' if total > 1 else ''} ({reasons})"


def no_text(where: str, omissions: Omissions | None = None, several: bool = False) -> DataError:
    """Return the error for a file, a folder or a dataset without any text.

    Args:
        where: its name.
        omissions: what was left out, where bad rows may be all that it holds.
        several: whether it is a folder or a pattern.
    """
    if omissions is not None and omissions.bad_rows:
        return DataError(
            f"{where}: holds no text that can be used: {omissions.bad_rows:,} bad rows were "
            f"skipped, the first one: {omissions.first_bad_row}",
            code="bad_rows",
        )
    if several:
        return DataError(
            f"{where}: every document is {EMPTY}; give one that holds text", code="no_text"
        )
    return DataError(
        f"{where}: holds no text (it is {EMPTY}); give one that holds some", code="no_text"
    )


def missing_column(where: str, column: str, present: Iterable[Any]) -> DataError:
    """Return the error for a column or key that does not exist, listing those that do."""
    names = ", ".join(map(str, present)) or "none"
    return DataError(
        f"{where}: no column {column!r}; set text_column to one of: {names}", code="no_column"
    )


def text_of(row: object, where: str, column: str) -> str:
    """Return the text of a row.

    Raises:
        DataError: it has none, or something else in its place.
    """
    if not isinstance(row, dict):
        raise DataError(f'{where}: not an object such as {{"text": "..."}}', code="not_object")
    if column not in row:
        raise missing_column(where, column, row)
    return checked_text(row[column], where, column)


def checked_text(value: object, where: str, column: str) -> str:
    """Return `value` if it is a string.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {column!r} holds {type(value).__name__}, not a string", code="no_string"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {column!r} holds half of a surrogate pair, which is not text",
            code="surrogate",
        ) from None
    return value
