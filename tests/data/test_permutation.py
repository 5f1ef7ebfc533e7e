"""Permutations in constant memory: each number once, in an order that looks like chance."""

import tracemalloc

import numpy as np
import pytest
from test_loader import Ramp, epoch

from textdiff.data import sequences
from textdiff.data.permutation import ROUNDS, permuted
from textdiff.data.sequences import PackedSequences


def keys(count: int, seed: int = 0) -> np.ndarray:
    return np.random.Philox(seed).random_raw((count, ROUNDS))


def test_every_number_comes_once():
    for size, key in zip([*range(1, 131), 255, 256, 257, 4096, 70_001], keys(135), strict=True):
        image = permuted(np.arange(size), size, key)
        assert np.array_equal(np.sort(image), np.arange(size))


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", [5, 16, 23])
def test_places_and_pairs_are_uniform_over_keys(size):
    images = np.array([permuted(np.array([0, size // 2]), size, key) for key in keys(12_000)])
    first, second = images.T
    degrees = size - 1
    for image in (first, second):
        assert chi_square(np.bincount(image, minlength=size)) < degrees + 4 * (2 * degrees) ** 0.5
    gap = (first - second) % size  # of pairs: each distance but 0 alike
    degrees = size - 2
    assert chi_square(np.bincount(gap, minlength=size)[1:]) < degrees + 4 * (2 * degrees) ** 0.5


def test_neighbours_are_scattered_within_one_order():
    size, bins = 100_003, 20
    image = permuted(np.arange(size), size, keys(1)[0])
    place = np.arange(size) * bins // size
    table = np.bincount(place * bins + image * bins // size, minlength=bins**2)
    step = np.diff(image) % size * bins // size
    for counts, degrees in ((table, (bins - 1) ** 2), (np.bincount(step), bins - 1)):
        assert chi_square(counts) < degrees + 4 * (2 * degrees) ** 0.5


def test_memory_does_not_grow_with_the_number_of_rows():
    tracemalloc.start()
    image = permuted(np.arange(1000) * 10**9, 2**40 + 1, keys(1)[0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    assert len(np.unique(image)) == 1000
    assert image.max() <= 2**40


def test_it_is_what_it_was():
    # Resuming an old run must find the same samples: these numbers never change.
    key = np.arange(1, ROUNDS + 1, dtype=np.uint64)
    assert permuted(np.arange(8), 10, key).tolist() == [3, 4, 9, 6, 0, 8, 1, 5]


def test_large_corpora_are_shuffled_by_it(monkeypatch):
    monkeypatch.setattr(sequences, "MOST_SORTED", 3)
    packed = PackedSequences(Ramp(803), 8, seed=5)
    orders = set()
    for number in range(3):
        rows = epoch(packed, number)
        assert len(np.unique(rows)) == rows.size
        orders.add(tuple(rows[:, 0].tolist()))
    orders.add(tuple(epoch(PackedSequences(Ramp(803), 8, seed=6), 0)[:, 0].tolist()))
    orders.add(tuple(epoch(PackedSequences(Ramp(803), 8, 5, source=1), 0)[:, 0].tolist()))
    assert len(orders) == 5
    assert packed._orders == {}
    whole = packed.rows(range(90, 130)).tokens  # across two epochs
    parts = [packed.rows(range(start, 130, 4)).tokens for start in range(90, 94)]
    for start, part in enumerate(parts):
        assert np.array_equal(part, whole[start::4])
