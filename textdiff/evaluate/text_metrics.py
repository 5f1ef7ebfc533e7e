"""Metrics of a set of texts, each a statistic that resampled texts have too.

Adding a metric is one entry of `METRICS`. Pooled figures (`entropy_pooled`, `distinct_n`) depend on
how much text there is, so they are for comparing sets of one size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from textdiff.evaluate.figures import UNDEFINED, Figure, Statistic, Weights, figure_of
from textdiff.evaluate.judges import Judgement
from textdiff.evaluate.suites import TextSet

Array = NDArray[np.float64]

_CELLS = 1 << 22  # of [resamples, pairs] at a time: 32 MB of float64


@dataclass(frozen=True)
class Subject:
    """T texts, and their likelihoods if there is a judge."""

    texts: TextSet
    judgement: Judgement | None = None


@dataclass(frozen=True)
class Metric:
    """A figure of a set of texts.

    Attributes:
        title: what a table calls it.
        unit: of the figure; empty: none.
        statistic: of a subject; None where the subject does not say.
        most: no figure is larger, and none below 0; nor are the ends of intervals.
    """

    title: str
    unit: str
    statistic: Callable[[Subject], Statistic | None]
    most: float = np.inf


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
        """Count n-grams.

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
        """Yield how often each n-gram occurs in sets of texts, [b, G], a few sets at a time."""
        sets = max(1, _CELLS // max(1, len(self.text)))
        for first in range(0, len(weights), sets):
            chosen = weights[first : first + sets, self.text]
            yield np.add.reduceat(chosen * self.count, self.start, axis=1)


def _number(texts: Sequence[Sequence[int]], n: int) -> NDArray[np.int64]:
    """Return a number for the n-gram at every place of long enough texts; equal ones share it."""
    if not texts:
        return np.zeros(0, dtype=np.int64)
    rows = [sliding_window_view(np.asarray(ids, dtype=np.int32), n) for ids in texts]
    whole = np.ascontiguousarray(np.concatenate(rows))
    keys = whole.view(np.dtype((np.void, whole.itemsize * n)))[:, 0]
    numbers: NDArray[np.int64] = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return numbers


def longest_repeat(ids: Sequence[int]) -> int:
    """Return the tokens of the longest stretch that a text holds twice or more, overlaps too."""
    held = np.asarray(ids, dtype=np.int32).tobytes()

    def repeats(n: int) -> bool:
        places = range(0, len(held) - 4 * n + 1, 4)
        return len({held[at : at + 4 * n] for at in places}) < len(places)

    low, high = 0, max(0, len(ids) - 1)  # what repeats at n tokens repeats at n - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if repeats(middle) else (low, middle - 1)
    return low


def ratio(above: Array, below: Array, then: Callable[[Array], Array] = lambda x: x) -> Statistic:
    """Return a function of the sum of one number per text over that of another, [T] each."""
    return lambda weights: then((weights @ above) / (weights @ below))


def log_perplexity(
    subject: Subject, then: Callable[[Array], Array] = lambda x: x
) -> Statistic | None:
    """Return the nats per judge token over all texts: the log of their generative perplexity."""
    judged = subject.judgement
    return None if judged is None else ratio(judged.nats, judged.tokens, then)


def _bits_per_byte(subject: Subject) -> Statistic | None:
    """Return bits per byte; undefined where the judge's tokens do not give the texts back."""
    judged = subject.judgement
    if judged is None or judged.lossy:
        return None
    return ratio(judged.nats / np.log(2.0), judged.bytes)


def _mean(value: Callable[[list[int]], float], least: int) -> Callable[[Subject], Statistic]:
    """Return the mean over texts of at least so many tokens; shorter ones do not define it."""

    def statistic(subject: Subject) -> Statistic:
        rows = subject.texts.tokens
        counts = np.array([len(ids) >= least for ids in rows], dtype=np.float64)
        values = np.array([value(ids) if len(ids) >= least else 0.0 for ids in rows])
        return ratio(values, counts)

    return statistic


def unigram_entropy(ids: list[int]) -> float:
    """Return the entropy in nats of the distribution of a text's own tokens, order ignored."""
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def _entropy_pooled(subject: Subject) -> Statistic:
    tokens = NGrams.of(subject.texts.tokens, 1)

    def statistic(weights: Weights) -> Array:
        entropies = []
        for often in tokens.frequencies(weights):
            share = often / often.sum(1, keepdims=True)
            entropies.append(-(share * np.log(np.where(share > 0, share, 1.0))).sum(1))
        return np.concatenate(entropies)

    return statistic


def _distinct(n: int) -> Callable[[Subject], Statistic | None]:
    """Return different n-grams of all texts over all their n-grams (arXiv:1510.03055)."""

    def statistic(subject: Subject) -> Statistic | None:
        grams = NGrams.of(subject.texts.tokens, n)
        if not len(grams.start):
            return None

        def share(weights: Weights) -> Array:
            different = np.concatenate([(f > 0).sum(1) for f in grams.frequencies(weights)])
            result: Array = different / (weights @ grams.totals)
            return result

        return share

    return statistic


def _repeated(n: int) -> Callable[[Subject], Statistic | None]:
    """Return the share of n-grams repeated within a text (arXiv:1908.04319), mean over texts."""

    def statistic(subject: Subject) -> Statistic | None:
        grams = NGrams.of(subject.texts.tokens, n)
        held = grams.totals > 0
        share = np.where(held, 1.0 - grams.distinct / np.maximum(grams.totals, 1.0), 0.0)
        return ratio(share, held.astype(np.float64)) if held.any() else None

    return statistic


def _length(size: Callable[[TextSet], list[int]]) -> Callable[[Subject], Statistic]:
    def statistic(subject: Subject) -> Statistic:
        sizes = np.array(size(subject.texts), dtype=np.float64)
        return ratio(sizes, np.ones_like(sizes))

    return statistic


def _ended(subject: Subject) -> Statistic | None:
    ended = subject.texts.ended
    if ended is None:
        return None
    marks = np.array(ended, dtype=np.float64)
    return ratio(marks, np.ones_like(marks))


def token_counts(texts: TextSet) -> list[int]:
    """Return the tokens of each text."""
    return [len(ids) for ids in texts.tokens]


def byte_counts(texts: TextSet) -> list[int]:
    """Return the UTF-8 bytes of each text."""
    return [len(text.encode()) for text in texts.texts]


TEXT_ENTROPY = _mean(unigram_entropy, 1)

METRICS: dict[str, Metric] = {
    "gen_ppl": Metric(
        "generative perplexity",
        "per judge token",
        lambda subject: log_perplexity(subject, np.exp),
    ),
    "judge_bits_per_byte": Metric("under the judge", "bits/byte", _bits_per_byte),
    "entropy": Metric("unigram entropy, per text", "nats", TEXT_ENTROPY),
    "entropy_pooled": Metric("unigram entropy, pooled", "nats", _entropy_pooled),
    **{f"distinct_{n}": Metric(f"distinct {n}-grams", "", _distinct(n), 1.0) for n in range(1, 5)},
    **{f"rep_{n}": Metric(f"repeated {n}-grams", "", _repeated(n), 1.0) for n in range(1, 5)},
    "longest_repeat": Metric("longest repeated stretch", "tokens", _mean(longest_repeat, 1)),
    "tokens": Metric("length", "tokens", _length(token_counts)),
    "bytes": Metric("length", "bytes", _length(byte_counts)),
    "ended": Metric("came to their end", "share", _ended, 1.0),
}
"""Every metric by the name that results call it."""


def measure(subject: Subject, weights: Weights) -> dict[str, Figure]:
    """Return all figures of a set of texts, NaN where it does not define them.

    Args:
        subject: T texts, judged or not.
        weights: [B, T] halves of them.
    """
    figures = {}
    for name, metric in METRICS.items():
        statistic = metric.statistic(subject)
        one = UNDEFINED if statistic is None else figure_of(statistic, weights)
        low, high = max(0.0, one.low), min(metric.most, one.high)
        figures[name] = Figure(one.value, low, high) if one.defined else one
    return figures


def length_quantiles(texts: TextSet) -> Mapping[str, Mapping[str, float]]:
    """Return quantiles of the lengths in tokens and bytes."""
    parts = {"least": 0.0, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "most": 1.0}
    sizes = {"tokens": token_counts(texts), "bytes": byte_counts(texts)}
    return {
        unit: {name: float(np.quantile(size, at)) for name, at in parts.items()}
        for unit, size in sizes.items()
    }
