"""The held-out split: whole documents chosen by their content, never by their position."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textdiff.data.document_stream import Documents, TextBlock
from textdiff.errors import DataError

_LEAST, _MOST = 0.8, 1.05  # of the fraction asked for


@dataclass(frozen=True)
class Scan:
    """Facts from one pass over a corpus, about each of its D documents.

    Attributes:
        digests: the SHA-256 of every document's UTF-8 bytes, S32 [D].
        characters: int64 [D].
        utf8: bytes, int64 [D].
    """

    digests: NDArray[np.bytes_]
    characters: NDArray[np.int64]
    utf8: NDArray[np.int64]

    @property
    def fingerprint(self) -> str:
        """`corpus_fingerprint` of the documents."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()


@dataclass(frozen=True)
class Split:
    """Both sides of a corpus, in the corpus's order.

    Attributes:
        train: the documents to train on.
        validation: the held-out ones.
        train_rows: which documents of the corpus are at least in part in `train`, bool [D].
        validation_rows: which are at least in part in `validation`, bool [D].
    """

    train: Documents
    validation: Documents
    train_rows: NDArray[np.bool_]
    validation_rows: NDArray[np.bool_]


def join_scans(scans: Sequence[Scan]) -> Scan:
    """Return the scan of the corpora one after another."""
    digests = np.concatenate([scan.digests for scan in scans])
    characters = np.concatenate([scan.characters for scan in scans])
    return Scan(digests, characters, np.concatenate([scan.utf8 for scan in scans]))


def scan_documents(
    documents: Documents, progress: Callable[[int], None] = lambda utf8: None
) -> Scan:
    """Read a corpus once.

    Args:
        documents: the corpus.
        progress: called with the bytes read since its last call.

    Raises:
        DataError: a place in the corpus holds no usable text.
    """
    digests = bytearray()
    characters: list[int] = []
    utf8: list[int] = []
    digest, length, size = hashlib.sha256(), 0, 0
    for text, last in documents.blocks():
        data = text.encode()
        digest.update(data)
        length += len(text)
        size += len(data)
        progress(len(data))
        if last:
            digests += digest.digest()
            characters.append(length)
            utf8.append(size)
            digest, length, size = hashlib.sha256(), 0, 0
    return Scan(
        np.frombuffer(bytes(digests), "S32"), np.array(characters, int), np.array(utf8, int)
    )


def split_documents(documents: Documents, fraction: float) -> Split:
    """Hold out about `fraction` of the characters.

    Documents are visited in the order of the SHA-256 of their text. They are held out while the
    held-out characters stay within 1.05 times the fraction asked for; documents that would
    overshoot are passed over. Identical documents count as one and end on one side. When whole
    documents cannot reach 0.8 times the fraction (few or long ones), every document is cut instead:
    its first `int(len(document) * (1 - fraction))` characters train and the rest is held out.

    Args:
        documents: the corpus.
        fraction: the fraction to hold out, between 0 and 1 (exclusive).

    Returns:
        Two corpora, neither of them empty.

    Raises:
        DataError: the corpus is too short to be divided.
    """
    return split_each([documents], [scan_documents(documents)], fraction)[0]


def split_each(
    corpora: Sequence[Documents],
    scans: Sequence[Scan],
    fraction: float,
    names: Sequence[str] = ("the corpus",),
    whole: bool = False,
) -> list[Split]:
    """Split several corpora, each as `split_documents` does.

    A document that one corpus holds out is held out of the others as well.

    Args:
        corpora: the corpora.
        scans: their scans.
        fraction: the fraction to hold out of each.
        names: of the corpora, for messages.
        whole: never cut documents: hold out as many of them as reach the fraction.

    Raises:
        DataError: one of them is too short to be divided, or the others hold out all of it.
    """
    chosen = [_choose(scan, fraction, whole) for scan in scans]
    everywhere = np.unique(np.concatenate([c for c in chosen if c is not None] or [_NONE]))
    return [
        _divide(documents, scan, fraction, None if digests is None else everywhere, name)
        for documents, scan, digests, name in zip(corpora, scans, chosen, names, strict=True)
    ]


_NONE = np.empty(0, "S32")


def _choose(scan: Scan, fraction: float, whole: bool = False) -> NDArray[np.bytes_] | None:
    """Return digests of the documents to hold out; None where whole ones do not fit."""
    digests, first, counts = np.unique(scan.digests, return_index=True, return_counts=True)
    sizes = (scan.characters[first] * counts).tolist()
    target = fraction * sum(sizes)
    chosen: list[int] = []
    held_out = 0
    for index, size in enumerate(sizes):
        if held_out >= target:
            break
        if 0 < size <= _MOST * target - held_out:
            chosen.append(index)
            held_out += size
    if whole and held_out < _LEAST * target:
        reached = np.searchsorted(np.cumsum(sizes), target) + 1
        chosen = list(range(min(int(reached), len(sizes) - 1)))
        return digests[chosen]
    fits = chosen and held_out >= _LEAST * target and len(chosen) < len(sizes)
    return digests[chosen] if fits else None


def _divide(
    documents: Documents,
    scan: Scan,
    fraction: float,
    held_out: NDArray[np.bytes_] | None,
    name: str,
) -> Split:
    lengths = scan.characters
    if held_out is None:
        # In Python's floats, one by one: the cut is where `int(len(text) * (1 - fraction))` is.
        cuts = np.array([int(n * (1 - fraction)) for n in lengths.tolist()], int)
    else:
        cuts = np.where(np.isin(scan.digests, held_out), 0, lengths)
    if not cuts.any() or not (lengths - cuts).any():
        raise DataError(
            f"{name} of {lengths.sum()} characters is too short to hold out {fraction:g} of it; "
            "give more text",
            code="short_corpus",
        )
    # Of the content alone: equal texts from elsewhere share their tokens.
    signature = hashlib.sha256(scan.fingerprint.encode() + cuts.tobytes()).hexdigest()

    def side(which: str, start: NDArray[np.int64], stop: NDArray[np.int64]) -> Documents:
        return Documents(
            lambda: _cut(documents.blocks(), scan, start, stop), f"{signature} {which}"
        )

    zeros = np.zeros_like(cuts)
    return Split(
        side("train", zeros, cuts), side("validation", cuts, lengths), cuts > 0, cuts < lengths
    )


def _cut(
    blocks: Iterator[TextBlock], scan: Scan, start: NDArray[np.int64], stop: NDArray[np.int64]
) -> Iterator[TextBlock]:
    """Yield the characters from `start` to `stop`, [D] each, of every document.

    Raises:
        ChangedSource: the documents are not those that were scanned.
    """
    row = position = 0
    digest = hashlib.sha256()
    for text, last in blocks:
        if row == len(scan.digests):
            raise ChangedSource
        begin, end = int(start[row]), int(stop[row])
        low, high = max(begin - position, 0), min(end - position, len(text))
        position += len(text)
        digest.update(text.encode())
        if last and digest.digest() != scan.digests[row : row + 1].tobytes():
            raise ChangedSource
        if low < high:
            yield TextBlock(text if high - low == len(text) else text[low:high], position >= end)
        if last:
            row, position, digest = row + 1, 0, hashlib.sha256()
    if row != len(scan.digests):
        raise ChangedSource


class ChangedSource(DataError):
    """A source has other text than when it was read before."""

    def __init__(self) -> None:
        super().__init__(
            "a source changed while it was read; run the command again", code="changed_source"
        )
