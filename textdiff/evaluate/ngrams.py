"""Which n-grams occur in which texts, in the shape that resampled texts are counted from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from textdiff.evaluate.bootstrap import Weights

_CELLS = 1 << 22  # of [resamples, pairs] at a time: 32 MB of float64


@dataclass(frozen=True)
class NGrams:
    """The n-grams of T texts: G different ones, in M pairs of an n-gram and a text.

    Attributes:
        text: [M] text of each pair, pairs lying in the order of their n-grams.
        count: [M] how often the n-gram occurs in the text.
        start: [G] first pair of each n-gram.
        totals: [T] n-grams of each text, repeated ones counted again.
        distinct: [T] different n-grams of each text.
    """

    text: NDArray[np.int64]
    count: NDArray[np.float64]
    start: NDArray[np.int64]
    totals: NDArray[np.float64]
    distinct: NDArray[np.float64]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], n: int) -> "NGrams":
        """Counts n-grams.

        Args:
            texts: token ids of each text, at least one text.
            n: tokens per n-gram.
        """
        sizes = np.array([len(ids) for ids in texts], dtype=np.int64)
        totals = np.maximum(sizes - n + 1, 0)
        owner = np.repeat(np.arange(len(texts)), totals)
        gram = _number([ids for ids in texts if len(ids) >= n], n)
        pairs, count = np.unique(gram * len(texts) + owner, return_counts=True)
        text = pairs % len(texts)
        start = np.unique(pairs // len(texts), return_index=True)[1]
        distinct = np.bincount(text, minlength=len(texts))
        counts = (numbers.astype(np.float64) for numbers in (count, totals, distinct))
        return cls(text, next(counts), start, next(counts), next(counts))

    def frequencies(self, weights: Weights) -> Iterator[NDArray[np.float64]]:
        """How often each n-gram occurs in sets of texts, [b, G], some sets at a time."""
        sets = max(1, _CELLS // max(1, len(self.text)))
        for first in range(0, len(weights), sets):
            chosen = weights[first : first + sets, self.text]
            yield np.add.reduceat(chosen * self.count, self.start, axis=1)


def _number(texts: Sequence[Sequence[int]], n: int) -> NDArray[np.int64]:
    """A number for the n-gram at every place of texts that are long enough; equal ones share it."""
    if not texts:
        return np.zeros(0, dtype=np.int64)
    rows = [sliding_window_view(np.asarray(ids, dtype=np.int32), n) for ids in texts]
    whole = np.ascontiguousarray(np.concatenate(rows))
    keys = whole.view(np.dtype((np.void, whole.itemsize * n)))[:, 0]
    numbers: NDArray[np.int64] = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return numbers


def longest_repeat(ids: Sequence[int]) -> int:
    """Tokens of the longest stretch that a text holds at least twice (stretches may overlap)."""
    held = np.asarray(ids, dtype=np.int32).tobytes()

    def repeats(n: int) -> bool:
        places = range(0, len(held) - 4 * n + 1, 4)
        return len({held[at : at + 4 * n] for at in places}) < len(places)

    low, high = 0, max(0, len(ids) - 1)  # what repeats at n tokens repeats at n - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle - 1)
    return low
