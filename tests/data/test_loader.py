import pickle

import numpy as np
import pytest
from refusals import refused

from textdiff.data.document_stream import from_texts
from textdiff.data.packing import tokenize
from textdiff.data.sections import ByteTokenizer
from textdiff.data.sequences import PackedSequences
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import DataError


class Ramp:
    """A stream whose token at position p is p; ten tokens per document."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.num_documents = -(-total // 10)

    def __len__(self) -> int:
        return self.total

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.total
        return np.arange(start, stop, dtype=np.int32)

    def documents(self, start: int, stop: int) -> np.ndarray:
        return self.read(start, stop) // 10


def epoch(packed: PackedSequences, number: int) -> np.ndarray:
    count = len(packed)
    return packed.rows(range(number * count, (number + 1) * count)).tokens


@pytest.mark.parametrize(("total", "length"), [(100, 7), (64, 8), (9, 9), (13, 9), (5, 1)])
def test_epochs_are_permutations_of_consecutive_windows(total: int, length: int):
    packed = PackedSequences(Ramp(total), length, seed=3)
    assert len(packed) == total // length
    for number in range(6):
        rows = epoch(packed, number)
        assert rows.dtype == np.int64
        phase = packed._phase(number)
        assert 0 <= phase < length
        starts = (phase + length * np.arange(len(packed))) % total
        windows = (starts[:, None] + np.arange(length)) % total
        order = np.argsort(packed._order(number))
        assert np.array_equal(rows[order], windows)
        assert len(np.unique(rows)) == rows.size  # no token twice in an epoch


def test_first_epoch_starts_at_the_beginning():
    rows = epoch(PackedSequences(Ramp(103), 10, seed=1), 0)
    assert np.array_equal(np.unique(rows), np.arange(100))


def test_phases_vary_and_cover_every_token_and_every_cut():
    packed = PackedSequences(Ramp(31), 8, seed=0)
    seen = [set(epoch(packed, number).ravel().tolist()) for number in range(40)]
    assert set().union(*seen) == set(range(31))
    assert {packed._phase(number) for number in range(1, 200)} == set(range(8))


def test_epochs_and_seeds_have_their_own_order():
    packed = PackedSequences(Ramp(800), 8, seed=0)
    orders = [tuple(packed._order(number)) for number in range(5)]
    orders += [tuple(PackedSequences(Ramp(800), 8, seed)._order(0)) for seed in range(1, 5)]
    assert len(set(orders)) == len(orders)


def test_order_is_uniform():
    # chi-square of "which sequence comes first" over 3000 epochs; 5 degrees of freedom.
    packed = PackedSequences(Ramp(12), 2, seed=11)
    counts = np.bincount([packed._order(number)[0] for number in range(3000)], minlength=6)
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # p = 0.001


def test_rows_are_a_function_of_the_index():
    indices = [0, 57, 3, 1000, 58, 3, 12, 999_999_999, 57]
    together = PackedSequences(Ramp(123), 6, seed=5).rows(indices)
    for place, index in enumerate(indices):
        alone = PackedSequences(Ramp(123), 6, seed=5).rows([index])
        assert np.array_equal(alone.tokens[0], together.tokens[place])
        assert np.array_equal(alone.documents[0], together.documents[place])


def test_orders_are_what_they_were():
    # Resuming an old run must find the same samples: these numbers never change.
    packed = PackedSequences(Ramp(80), 8, seed=7)
    assert packed._order(0).tolist() == [8, 4, 3, 6, 2, 1, 0, 5, 9, 7]
    assert packed._order(1).tolist() == [7, 9, 6, 1, 4, 8, 3, 2, 5, 0]
    assert [packed._phase(number) for number in range(5)] == [0, 5, 3, 2, 4]


def test_memory_holds_two_orders():
    packed = PackedSequences(Ramp(100), 10, seed=0)
    for index in range(0, 200, 7):
        packed.rows([index])
    assert len(packed._orders) <= 2


def test_wrapping_around_starts_another_document():
    packed = PackedSequences(Ramp(9), 9, seed=2)  # one document, one sequence
    number = next(n for n in range(1, 50) if packed._phase(n))
    rows = packed.rows([number])
    wrap = 9 - packed._phase(number)
    assert rows.documents.dtype == np.int32
    assert rows.documents[0].tolist() == [0] * wrap + [1] * (9 - wrap)
    assert rows.tokens[0].tolist() == [*range(packed._phase(number), 9), *range(9 - wrap)]


def test_short_corpus_is_refused():
    with refused(DataError, "short_corpus", "5 tokens", "of 6"):
        PackedSequences(Ramp(5), 6, seed=0)


def test_real_stream_survives_pickling(tmp_path, corpus):
    tokenizer = train_tokenizer(ByteTokenizer(), [])
    stream = tokenize(from_texts(corpus), tokenizer, num_proc=1, cache_dir=str(tmp_path))
    packed = PackedSequences(stream, 64, seed=0)
    indices = [5, 2 * len(packed) + 1, 7]
    copied = pickle.loads(pickle.dumps(packed)).rows(indices)
    assert np.array_equal(copied.tokens, packed.rows(indices).tokens)
    whole = "".join(text + "\0" for text in corpus).encode()
    values = np.where(
        packed.rows([5]).tokens[0] == tokenizer.eos_token_id, 0, packed.rows([5]).tokens[0]
    )
    assert bytes(values.astype(np.uint8)) in whole
