"""The held-out split: whole documents chosen by their content, never by their position."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass

from datasets import Dataset

from textdiff.data.sources import from_texts, iterate_texts
from textdiff.errors import DataError

_LEAST, _MOST = 0.8, 1.05  # of the fraction asked for


@dataclass(frozen=True)
class Split:
    """Both sides of a corpus, each a dataset with the column `text` in the corpus's order."""

    train: Dataset
    validation: Dataset


def split_documents(documents: Dataset, fraction: float) -> Split:
    """Holds out about `fraction` of the characters.

    Documents are visited in the order of the SHA-256 of their text and held out while the held-out
    characters stay within 1.05 times the fraction asked for; documents that would overshoot are
    passed over. Identical documents count as one and end on one side. When whole documents cannot
    reach 0.8 times the fraction (few or long ones), every document is cut instead: its first
    `int(len(document) * (1 - fraction))` characters train and the rest is held out.

    Args:
        documents: a dataset with the column `text`.
        fraction: the part to hold out, between 0 and 1 (exclusive).

    Returns:
        Two datasets, neither of them empty.

    Raises:
        DataError: the corpus is too short to be divided.
    """
    rows: dict[bytes, list[int]] = defaultdict(list)
    lengths: dict[bytes, int] = {}
    for row, text in enumerate(iterate_texts(documents)):
        digest = hashlib.sha256(text.encode()).digest()
        rows[digest].append(row)
        lengths[digest] = len(text)
    sizes = {digest: lengths[digest] * len(rows[digest]) for digest in rows}
    chosen = _choose(sizes, fraction)
    if chosen is None:
        return _cut(documents, fraction)
    held_out = sorted(row for digest in chosen for row in rows[digest])
    training = sorted(row for digest in rows.keys() - chosen for row in rows[digest])
    return Split(documents.select(training), documents.select(held_out))


def _choose(sizes: dict[bytes, int], fraction: float) -> set[bytes] | None:
    """Picks the documents to hold out, or None where whole documents do not fit the fraction."""
    target = fraction * sum(sizes.values())
    chosen: set[bytes] = set()
    held_out = 0
    for digest in sorted(sizes):
        if held_out >= target:
            break
        if 0 < sizes[digest] <= _MOST * target - held_out:
            chosen.add(digest)
            held_out += sizes[digest]
    return chosen if chosen and held_out >= _LEAST * target and len(chosen) < len(sizes) else None


def _cut(documents: Dataset, fraction: float) -> Split:
    heads: list[str] = []
    tails: list[str] = []
    for text in iterate_texts(documents):
        index = int(len(text) * (1 - fraction))
        heads.append(text[:index])
        tails.append(text[index:])
    training = [text for text in heads if text]
    held_out = [text for text in tails if text]
    if not training or not held_out:
        characters = sum(map(len, heads)) + sum(map(len, tails))
        raise DataError(
            f"the corpus of {characters} characters is too short to hold out {fraction:g} of it; "
            "give more text"
        )
    return Split(from_texts(training), from_texts(held_out))
