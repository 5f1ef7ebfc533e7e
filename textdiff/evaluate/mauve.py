"""MAUVE: how far the distributions of samples and real text lie apart (arXiv:2102.01454).

Texts become features, features fall into clusters shared by both sides, and the two histograms P, Q
over clusters are compared along all mixtures R = w P + (1 - w) Q: the area under the curve of
(exp(-c KL(Q|R)), exp(-c KL(P|R))). The package mauve-text clusters; the area is computed here, so
that it can be resampled: given the clusters, a half of the texts is a half of the histogram.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textdiff.errors import ConfigError
from textdiff.evaluate.bootstrap import Figure, half_sample_interval

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
    """Return MAUVE with its 95 % interval over texts, for these clusters.

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
