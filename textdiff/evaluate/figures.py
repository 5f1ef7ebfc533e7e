"""Figures of texts with intervals: how far one would move with other texts of the same source.

A figure of T texts is written as a statistic of how often each of them counts. Once each gives the
figure. Random halves of them, drawn without replacement, give its spread (half-sample bootstrap;
Shao and Wu, 1989, for statistics that are not means). The spread of half the texts within a finite
set is that of all of them among their kind. Draws with replacement would repeat texts, which alone
lowers the share of distinct n-grams: its spread would be that of how many texts were drawn twice.
Percentiles of the halves' figures are moved to the figure, since a pooled entropy of half the text
is lower by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import ConfigError

Weights = NDArray[np.float64]
"""[B, T] how often each text counts in each of B sets."""

Statistic = Callable[[Weights], NDArray[np.float64]]
"""Figures [B] of B sets of the texts it was made for."""

CONFIDENCE = 0.95
_Z_SCORE = 1.959964


@dataclass(frozen=True)
class Figure:
    """A number with its interval; NaN where the texts do not define it.

    Attributes:
        value: the figure of the texts.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def defined(self) -> bool:
        """True where there is a number."""
        return bool(np.isfinite(self.value))

    def to_dict(self) -> dict[str, float | None]:
        """Return plain data; None for what is not defined."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(x) if np.isfinite(x) else None for name, x in parts.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, float | None]) -> "Figure":
        """Return the figure that `to_dict` wrote."""
        numbers = (data[name] for name in ("value", "low", "high"))
        return cls(*(float("nan") if x is None else x for x in numbers))


UNDEFINED = Figure(float("nan"), float("nan"), float("nan"))


def resample(texts: int, resamples: int, seed: int) -> Weights:
    """Return random halves of some texts.

    Args:
        texts: T, at least 2.
        resamples: B.
        seed: seed of the draws; one seed gives all figures of a set of texts the same halves.

    Returns:
        [B, T], 1 for the T // 2 texts that are in, else 0.
    """
    order = np.random.default_rng(seed).random((resamples, texts)).argsort(axis=1)
    return (order < texts // 2).astype(np.float64)


def half_sample_interval(
    halves: NDArray[np.float64], value: float, texts: int
) -> tuple[float, float]:
    """Return the 95 % interval of a figure, from those of halves.

    Args:
        halves: [B] their figures.
        value: the figure of all texts.
        texts: T.
    """
    half = texts // 2
    scale = np.sqrt(half / (texts - half))  # 1 but for odd numbers
    low, high = np.quantile(halves - halves.mean(), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return value + float(scale * low), value + float(scale * high)


def figure_of(statistic: Statistic, weights: Weights) -> Figure:
    """Return the figure of all texts once each, and its 95 % interval.

    Args:
        statistic: of the texts.
        weights: halves of them, from `resample`.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(np.ones((1, weights.shape[1])))[0])
        halves = statistic(weights)  # [B]
    halves = halves[np.isfinite(halves)]
    if not np.isfinite(value) or not len(halves):
        return UNDEFINED
    return Figure(value, *half_sample_interval(halves, value, weights.shape[1]))


Array = NDArray[np.float64]

SCALE = 5.0
"""c of the divergence curve, the published value."""

_POINTS = 25


def require_mauve() -> Any:
    """Return the package mauve-text.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import mauve
    except ImportError:
        raise ConfigError(
            'MAUVE needs the package mauve-text; pip install "textdiff[eval]", or leave --mauve out'
        ) from None
    return mauve


@dataclass(frozen=True)
class Histograms:
    """Texts per cluster on either side, [K] each."""

    samples: Array
    reference: Array


def cluster(samples: NDArray[np.float32], reference: NDArray[np.float32], seed: int) -> Histograms:
    """Cluster the features of both sides together: one cluster per ten texts of a side.

    Args:
        samples: [T, D] features.
        reference: [T', D] features of real text.
        seed: of the clustering.
    """
    clustered = require_mauve().compute_mauve(
        p_features=samples, q_features=reference, seed=seed, verbose=False
    )
    return Histograms(clustered.p_hist * len(samples), clustered.q_hist * len(reference))


def area(p: Array, q: Array) -> Array:
    """Return MAUVE of pairs of histograms: 1 where equal, near 0 where they share nothing.

    Args:
        p: [B, K] shares that add up to one.
        q: [B, K].

    Returns:
        [B].
    """
    mixing = np.linspace(1e-6, 1.0 - 1e-6, _POINTS)[:, None, None]
    mixture = mixing * p + (1.0 - mixing) * q  # [W, B, K]
    x = np.exp(-SCALE * _divergence(q, mixture))
    y = np.exp(-SCALE * _divergence(p, mixture))
    # The curve starts on one axis, where all of the mixture is p, and ends on the other.
    one, zero = np.ones((1, len(p))), np.zeros((1, len(p)))
    x, y = np.concatenate([zero, x[::-1], one]), np.concatenate([one, y[::-1], zero])
    order = np.argsort(x, axis=0, kind="stable")
    x, y = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    result: Array = ((y[1:] + y[:-1]) / 2 * np.diff(x, axis=0)).sum(0)
    return result


def _divergence(p: Array, mixture: Array) -> Array:
    """Return KL(p | mixture) in nats, 0 log 0 being 0."""
    held = p > 0
    logs = np.log(np.where(held, p, 1.0)) - np.log(np.where(held, mixture, 1.0))
    result: Array = (np.where(held, p, 0.0) * logs).sum(-1)
    return result


def mauve(clustered: Histograms, resamples: int, seed: int) -> Figure:
    """Return MAUVE with its 95 % interval over texts, for these clusters (arXiv:2102.01454).

    Texts become features, features fall into clusters shared by both sides. The two histograms P, Q
    over clusters are compared along all mixtures R = w P + (1 - w) Q: the area under the curve of
    (exp(-c KL(Q|R)), exp(-c KL(P|R))). The package mauve-text clusters; the area is computed here,
    so that it can be resampled: given the clusters, half the texts are half of the histogram.

    Args:
        clustered: the clustered texts.
        resamples: halves of the texts, drawn on either side.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)

    def halves(counts: Array) -> Array:
        whole = np.round(counts).astype(np.int64)
        drawn = rng.multivariate_hypergeometric(whole, int(whole.sum()) // 2, size=resamples)
        shares: Array = drawn / drawn.sum(1, keepdims=True)
        return shares

    sides = (clustered.samples, clustered.reference)
    value = float(area(*(side[None] / side.sum() for side in sides))[0])
    texts = min(round(float(side.sum())) for side in sides)
    low, high = half_sample_interval(area(*(halves(side) for side in sides)), value, texts)
    return Figure(value, max(0.0, low), min(1.0, high))


@dataclass(frozen=True)
class Place:
    """A measured point.

    Attributes:
        entropy: nats.
        log_ppl: nats per judge token.
        covariance: of the two over resampled texts: (var entropy, covariance, var log_ppl).
    """

    entropy: float
    log_ppl: float
    covariance: tuple[float, float, float]

    @classmethod
    def of(cls, entropy: Statistic, log_ppl: Statistic, weights: Weights) -> "Place":
        """Measure both on the same resampled texts.

        Args:
            entropy: of the texts.
            log_ppl: of the texts.
            weights: [B, T] halves of them.
        """
        once = np.ones((1, weights.shape[1]))
        half = weights.shape[1] // 2
        scale = half / (weights.shape[1] - half)
        spread = scale * np.cov(np.stack([entropy(weights), log_ppl(weights)]))
        cells = (float(spread[0, 0]), float(spread[0, 1]), float(spread[1, 1]))
        return cls(float(entropy(once)[0]), float(log_ppl(once)[0]), cells)

    def variance(self, slope: float) -> float:
        """Return the variance of the vertical distance from a line of that slope."""
        of_entropy, both, of_log = self.covariance
        return of_log - 2.0 * slope * both + slope * slope * of_entropy


def excess(place: Place, curve: Sequence[Place]) -> Figure:
    """Return a point's log perplexity less the curve's at its entropy, with a 95 % interval.

    The curve is drawn straight between its points. Errors of the point and of the two ends of its
    segment count as independent; with common random numbers they are less than that.

    Args:
        place: the point.
        curve: points of the curve, in any order.

    Returns:
        Nats per judge token; NaN where the curve does not reach.
    """
    ordered = sorted(curve, key=lambda p: p.entropy)
    for left, right in pairwise(ordered):
        if left.entropy <= place.entropy <= right.entropy and left.entropy < right.entropy:
            share = (place.entropy - left.entropy) / (right.entropy - left.entropy)
            slope = (right.log_ppl - left.log_ppl) / (right.entropy - left.entropy)
            value = place.log_ppl - (1 - share) * left.log_ppl - share * right.log_ppl
            variance = place.variance(slope)
            variance += (1 - share) ** 2 * left.variance(slope)
            variance += share**2 * right.variance(slope)
            error = _Z_SCORE * float(np.sqrt(max(0.0, variance)))
            return Figure(value, value - error, value + error)
    return UNDEFINED
