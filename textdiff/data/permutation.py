"""Pseudo-random permutations of 0 .. n - 1 in constant memory, evaluated where they are needed.

A balanced Feistel network permutes the smallest power of 4 that is at least n. The halves of the
bits of a number take turns: one is changed by a keyed hash of the other (Luby and Rackoff, 1988).
Numbers that land beyond n are sent through again (cycle walking, Black and Rogaway, 2002), which
takes less than four passes on average. Sorting n random words takes 16 bytes of each.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Words of a key. Four would do for a strong hash (Luby and Rackoff, 1988); this one is quick."""

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permuted(places: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the images of some places under the permutation of 0 .. size - 1 that a key names.

    Args:
        places: [N] numbers below `size`.
        size: n, up to 2 ** 62.
        key: [ROUNDS] random words.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))  # bits of each half
    image = _feistel(places.astype(np.uint64), half, key)
    beyond = np.flatnonzero(image >= np.uint64(size))
    while len(beyond):
        image[beyond] = _feistel(image[beyond], half, key)
        beyond = beyond[image[beyond] >= np.uint64(size)]
    return image.astype(np.int64)


def _feistel(numbers: NDArray[np.uint64], half: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute numbers of 2 `half` bits."""
    bits = np.uint64(half)
    mask = np.uint64((1 << half) - 1)
    left, right = numbers >> bits, numbers & mask
    for word in key:
        left, right = right, left ^ (_mixed(right ^ word) >> (np.uint64(64) - bits))
    return (left << bits) | right


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash words, each by itself (the finaliser of SplitMix64, Steele, Lea and Flood, 2014)."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
