"""Training sequences of several sources in fixed proportions, addressed by one endless index.

Which source a sample comes from is a fixed pattern with the period T, the sum of the weights as
whole numbers: source k, of weight w out of T, has its draws at the times (j + 1/2) T / w, and the
pattern is all draws in the order of their times (the divisor method of Sainte-Laguë). In every
prefix of n samples a source's count differs from n w / T by at most (1 + K w / T) / 2, for K
sources; for two it is the nearest whole number. The j-th draw from a source is the j-th sample of
its own `PackedSequences`: every source goes through epochs of its own.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, gcd, lcm

import numpy as np
from numpy.typing import NDArray

from textdiff.data.loader import PackedSequences, Rows
from textdiff.errors import DataError

LONGEST_PERIOD = 1_000_000


class Mixture:
    """Sequences of equal length from several sources.

    Attributes:
        parts: the sources' sequences.
        shares: which part of all samples each source gives; they sum to one.
        sequence_length: L, in tokens.

    Args:
        parts: the sources' sequences, of one length.
        weights: positive numbers; only their ratios matter.

    Raises:
        DataError: a weight is too small beside the others.
    """

    def __init__(self, parts: Sequence[PackedSequences], weights: Sequence[float]) -> None:
        self.parts = tuple(parts)
        self.sequence_length = parts[0].sequence_length
        counts = whole_weights(weights)
        self.shares = tuple(count / sum(counts) for count in counts)
        self._counts = np.array(counts)
        self._sources, self._draws = _pattern(counts)

    def __len__(self) -> int:
        """Samples after which every source has been read at least once."""
        pairs = zip(self.parts, self.shares, strict=True)
        return max(ceil(len(part) / share) for part, share in pairs)

    def locate(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of every sample, and the number of the sample among its source's, [B] each."""
        periods, places = np.divmod(np.asarray(indices, np.int64), len(self._sources))
        sources = self._sources[places].astype(np.int64)
        return sources, self._draws[places] + periods * self._counts[sources]

    def rows(self, indices: Sequence[int]) -> Rows:
        """Reads samples.

        Args:
            indices: global sample indices 0, 1, 2, … without an end, in any order.
        """
        shape = (len(indices), self.sequence_length)
        tokens = np.empty(shape, np.int64)
        documents = np.empty(shape, np.int32)
        sources, draws = self.locate(indices)
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(sources == number)
            rows = part.rows(draws[mine].tolist())
            tokens[mine], documents[mine] = rows.tokens, rows.documents
        return Rows(tokens, documents)


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratios of the weights as they are written.

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
            "a millionth of all weights; raise it, or leave the source out"
        )
    return rounded


def _pattern(counts: Sequence[int]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The source of every sample of a period, and its number among the source's, [T] each."""
    # Correctly rounded quotients of equal fractions are equal, so that ties are true ties; the
    # stable sort gives them to the source that comes first.
    times = np.concatenate([(2 * np.arange(count) + 1) / (2 * count) for count in counts])
    order = np.argsort(times, kind="stable")
    sources = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    draws = np.concatenate([np.arange(count) for count in counts])
    return sources[order], draws[order]
