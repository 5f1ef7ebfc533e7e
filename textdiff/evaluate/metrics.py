"""What is measured of a set of texts, each figure a statistic that resampled texts have too.

Adding a metric is one entry of `METRICS`. Pooled figures (`entropy_pooled`, `distinct_n`) depend on
how much text there is, so they are for comparing sets of one size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from textdiff.evaluate.bootstrap import UNDEFINED, Figure, Statistic, Weights, figure
from textdiff.evaluate.judge import Judgement
from textdiff.evaluate.ngrams import NGrams, longest_repeat
from textdiff.evaluate.texts import Texts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """T texts, and what a judge makes of them if there is one."""

    texts: Texts
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


def ratio(above: Array, below: Array, then: Callable[[Array], Array] = lambda x: x) -> Statistic:
    """The sum of one number per text over the sum of another, [T] each, put through a function."""
    return lambda weights: then((weights @ above) / (weights @ below))


def _judged(
    above: Callable[[Judgement], Array],
    below: Callable[[Judgement], Array],
    then: Callable[[Array], Array] = lambda x: x,
) -> Callable[[Subject], Statistic | None]:
    """A ratio of what a judge found; undefined without one."""

    def statistic(subject: Subject) -> Statistic | None:
        found = subject.judgement
        return None if found is None else ratio(above(found), below(found), then)

    return statistic


def _bits_per_byte(subject: Subject) -> Statistic | None:
    """Bits per byte; undefined where the judge's tokens do not give the texts back."""
    found = subject.judgement
    if found is None or found.lossy:
        return None
    return ratio(found.nats / np.log(2.0), found.bytes)


def _mean(value: Callable[[list[int]], float], least: int) -> Callable[[Subject], Statistic]:
    """The mean over texts of at least so many tokens; shorter ones do not define it."""

    def statistic(subject: Subject) -> Statistic:
        rows = subject.texts.tokens
        counts = np.array([len(ids) >= least for ids in rows], dtype=np.float64)
        values = np.array([value(ids) if len(ids) >= least else 0.0 for ids in rows])
        return ratio(values, counts)

    return statistic


def entropy(ids: list[int]) -> float:
    """Nats of the law that a text's own tokens have, counted without regard to their order."""
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def _entropy_pooled(subject: Subject) -> Statistic:
    tokens = NGrams.of(subject.texts.tokens, 1)

    def statistic(weights: Weights) -> Array:
        found = []
        for often in tokens.frequencies(weights):
            share = often / often.sum(1, keepdims=True)
            found.append(-(share * np.log(np.where(share > 0, share, 1.0))).sum(1))
        return np.concatenate(found)

    return statistic


def _distinct(n: int) -> Callable[[Subject], Statistic | None]:
    """Different n-grams of all texts over all their n-grams (arXiv:1510.03055)."""

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
    """Share of a text's n-grams that it has had before (arXiv:1908.04319), averaged over texts."""

    def statistic(subject: Subject) -> Statistic | None:
        grams = NGrams.of(subject.texts.tokens, n)
        held = grams.totals > 0
        share = np.where(held, 1.0 - grams.distinct / np.maximum(grams.totals, 1.0), 0.0)
        return ratio(share, held.astype(np.float64)) if held.any() else None

    return statistic


def _length(size: Callable[[Texts], list[int]]) -> Callable[[Subject], Statistic]:
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


def token_counts(texts: Texts) -> list[int]:
    """Tokens of each text."""
    return [len(ids) for ids in texts.tokens]


def byte_counts(texts: Texts) -> list[int]:
    """UTF-8 bytes of each text."""
    return [len(text.encode()) for text in texts.texts]


LOG_PPL = _judged(lambda j: j.nats, lambda j: j.tokens)
"""Nats per judge token over all texts: the log of their generative perplexity."""

TEXT_ENTROPY = _mean(entropy, 1)

METRICS: dict[str, Metric] = {
    "gen_ppl": Metric(
        "generative perplexity",
        "per judge token",
        _judged(lambda j: j.nats, lambda j: j.tokens, np.exp),
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
    """All figures of a set of texts, those that it does not define being NaN.

    Args:
        subject: T texts, judged or not.
        weights: [B, T] halves of them.
    """
    found = {}
    for name, metric in METRICS.items():
        statistic = metric.statistic(subject)
        one = UNDEFINED if statistic is None else figure(statistic, weights)
        low, high = max(0.0, one.low), min(metric.most, one.high)
        found[name] = Figure(one.value, low, high) if one.defined else one
    return found


def length_quantiles(texts: Texts) -> Mapping[str, Mapping[str, float]]:
    """Quantiles of the lengths in tokens and bytes."""
    parts = {"least": 0.0, "quarter": 0.25, "median": 0.5, "three_quarters": 0.75, "most": 1.0}
    sizes = {"tokens": token_counts(texts), "bytes": byte_counts(texts)}
    return {
        unit: {name: float(np.quantile(found, at)) for name, at in parts.items()}
        for unit, found in sizes.items()
    }
