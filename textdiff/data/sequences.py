"""Training sequences cut from token streams, addressed by one endless index.

Sample `i` of a stream belongs to epoch `i // N` of `N = tokens // L` sequences. Every epoch has
its own order and its own phase: where in the stream the first cut falls. Both are functions of the
seed and the epoch. A sample depends on nothing else, so a run resumes, and spreads over processes,
by indices alone.

Several streams are mixed in fixed proportions. The source of a sample is a fixed pattern with the
period T, the sum of the weights as whole numbers. Source k, of weight w out of T, has its draws at
the times (j + 1/2) T / w. The pattern is all draws in the order of their times (the divisor method
of Sainte-Laguë). In every prefix of n samples a source's count is near n w / T: it differs by at
most (1 + K w / T) / 2 for K sources. For two it is the nearest whole number. The j-th draw from a
source is the j-th sample of its own `PackedSequences`: every source goes through epochs of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, gcd, lcm

import numpy as np
from numpy.typing import NDArray

from textdiff.data.permutation import ROUNDS, permuted
from textdiff.data.token_stream import TokenStream
from textdiff.errors import DataError

_EPOCHS_KEPT = 2  # a batch may straddle two epochs
# Up to so many rows an order is sorted and kept: 256 MiB and seconds in every worker. More are
# permuted one by one, in constant memory. Orders depend on this number: it may not change.
MOST_SORTED = 2**24
# Numbers of documents are taken modulo this: those of one row follow each other.
_DOCUMENTS = 2**30
_ORDER, _PHASE = 0, 1


@dataclass(frozen=True)
class PackedRows:
    """Packed sequences.

    Attributes:
        tokens: int64 [B, L].
        documents: int32 [B, L], which document a token belongs to; equal numbers within a row mean
            the same document.
    """

    tokens: NDArray[np.int64]
    documents: NDArray[np.int32]


class Epochs:
    """Epochs of rows, each in an order of its own that follows from the seed.

    Attributes:
        seed: of the orders.

    Args:
        seed: a non-negative integer.
        source: its number in a mixture, so that equal lengths have different orders.
    """

    def __init__(self, seed: int, source: int | None = None) -> None:
        self.seed = seed
        self._source = () if source is None else (source,)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """Return the rows per epoch."""
        raise NotImplementedError

    def shuffled(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epoch of every sample, and its row among the epoch's, [B] each."""
        epochs, places = np.divmod(np.asarray(indices, np.int64), len(self))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            rows[chosen] = self._shuffle(epoch, places[chosen])
        return epochs, rows

    def _shuffle(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at some places of an epoch's order."""
        if len(self) > MOST_SORTED:
            return permuted(places, len(self), self._raw(epoch, _ORDER, ROUNDS))
        return self._order(epoch)[places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch's rows."""
        if epoch not in self._orders:
            while len(self._orders) >= _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            raw = self._raw(epoch, _ORDER, len(self))
            self._orders[epoch] = np.argsort(raw, kind="stable")
        return self._orders[epoch]

    def _raw(self, epoch: int, purpose: int, size: int) -> NDArray[np.uint64]:
        """Draw random words: numpy keeps its bit generators as they are, not `permutation`."""
        entropy = (self.seed, epoch, purpose, *self._source)
        generator = np.random.Philox(np.random.SeedSequence(entropy))
        words: NDArray[np.uint64] = generator.random_raw(size)
        return words


class PackedSequences(Epochs):
    """Sequences of equal length, read from the stream when asked for.

    The stream is a ring. An epoch starts at its phase, 0 in the first epoch and random in [0, L)
    after it. It may run over the end into the beginning, so that the tokens that one epoch leaves
    over appear in others.

    Attributes:
        stream: the tokens.
        sequence_length: L, in tokens.
        seed: of the orders and phases.

    Args:
        stream: the tokens.
        sequence_length: L, in tokens.
        seed: a non-negative integer.
        source: its number in a mixture, so that equal lengths have different orders.

    Raises:
        DataError: the stream is shorter than one sequence.
    """

    def __init__(
        self, stream: TokenStream, sequence_length: int, seed: int, source: int | None = None
    ) -> None:
        if len(stream) < sequence_length:
            raise DataError(
                f"the training text has {len(stream)} tokens, fewer than one sequence of "
                f"{sequence_length}; give more text or lower data.sequence_length",
                code="short_corpus",
            )
        self.stream = stream
        self.sequence_length = sequence_length
        super().__init__(seed, source)

    def __len__(self) -> int:
        """Return the sequences per epoch."""
        return len(self.stream) // self.sequence_length

    def rows(self, indices: Sequence[int]) -> PackedRows:
        """Read samples.

        Args:
            indices: global sample indices 0, 1, 2, … without an end, in any order.
        """
        shape = (len(indices), self.sequence_length)
        tokens = np.empty(shape, np.int64)
        documents = np.empty(shape, np.int32)
        epochs, sequences = self.shuffled(indices)
        phases = {epoch: self._phase(epoch) for epoch in np.unique(epochs).tolist()}
        for row, (epoch, sequence) in enumerate(
            zip(epochs.tolist(), sequences.tolist(), strict=True)
        ):
            start = phases[epoch] + sequence * self.sequence_length
            self._fill(start, tokens[row], documents[row])
        return PackedRows(tokens, documents)

    def _fill(self, start: int, tokens: NDArray[np.int64], documents: NDArray[np.int32]) -> None:
        total = len(self.stream)
        begin = start % total
        stop = min(begin + self.sequence_length, total)
        split = stop - begin
        tokens[:split] = self.stream.read(begin, stop)
        documents[:split] = self.stream.documents(begin, stop) % _DOCUMENTS
        if split < self.sequence_length:
            rest = self.sequence_length - split
            tokens[split:] = self.stream.read(0, rest)
            # Beyond the end the corpus starts anew: no token there continues the document before.
            again = self.stream.documents(0, rest) + self.stream.num_documents
            documents[split:] = again % _DOCUMENTS

    def _phase(self, epoch: int) -> int:
        if epoch == 0:
            return 0
        return int(self._raw(epoch, _PHASE, 1)[0] % np.uint64(self.sequence_length))


LONGEST_PERIOD = 1_000_000


class Mixture:
    """Sequences of equal length from several sources.

    Attributes:
        sources: their sequences.
        shares: the fraction of all samples that each source gives; they sum to one.
        sequence_length: L, in tokens.

    Args:
        sources: their sequences, of one length.
        weights: positive numbers; only their ratios matter.

    Raises:
        DataError: a weight is too small beside the others.
    """

    def __init__(self, sources: Sequence[PackedSequences], weights: Sequence[float]) -> None:
        self.sources = tuple(sources)
        self.sequence_length = sources[0].sequence_length
        counts = whole_weights(weights)
        self.shares = tuple(count / sum(counts) for count in counts)
        self._counts = np.array(counts)
        self._pattern, self._draws = _pattern(counts)

    def __len__(self) -> int:
        """Return the samples after which every source has been read at least once."""
        pairs = zip(self.sources, self.shares, strict=True)
        return max(ceil(len(sequences) / share) for sequences, share in pairs)

    def locate(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of every sample, and its number among the source's, [B] each."""
        periods, places = np.divmod(np.asarray(indices, np.int64), len(self._pattern))
        sources = self._pattern[places].astype(np.int64)
        return sources, self._draws[places] + periods * self._counts[sources]

    def rows(self, indices: Sequence[int]) -> PackedRows:
        """Read samples.

        Args:
            indices: global sample indices 0, 1, 2, … without an end, in any order.
        """
        shape = (len(indices), self.sequence_length)
        tokens = np.empty(shape, np.int64)
        documents = np.empty(shape, np.int32)
        sources, draws = self.locate(indices)
        for number, sequences in enumerate(self.sources):
            chosen = np.flatnonzero(sources == number)
            rows = sequences.rows(draws[chosen].tolist())
            tokens[chosen], documents[chosen] = rows.tokens, rows.documents
        return PackedRows(tokens, documents)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers in the ratios of the weights as they are written.

    Where their sum would exceed `LONGEST_PERIOD`, they are rounded to parts of it.

    Raises:
        DataError: a weight would be rounded to nothing.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = gcd(*whole)
    whole = [count // divisor for count in whole]
    if sum(whole) <= LONGEST_PERIOD:
        return whole
    total = sum(exact)
    rounded = [round(weight / total * LONGEST_PERIOD) for weight in exact]
    if not all(rounded):
        raise DataError(
            f"data.sources.{rounded.index(0)}: weight {weights[rounded.index(0)]:g} is less than "
            "a millionth of all weights; raise it, or leave the source out",
            code="small_weight",
        )
    return rounded


def _pattern(counts: Sequence[int]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Return the source of every sample of a period, and its number among the source's, [T]."""
    # Correctly rounded quotients of equal fractions are equal, so that ties are true ties; the
    # stable sort gives them to the source that comes first.
    times = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts])
    order = np.argsort(times, kind="stable")
    sources = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    draws = np.concatenate([np.arange(count) for count in counts])
    return sources[order], draws[order]
