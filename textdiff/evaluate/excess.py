"""How far a point of the plane (entropy, log perplexity) lies above a curve, with its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from textdiff.evaluate.bootstrap import UNDEFINED, Figure, Statistic, Weights

_Z = 1.959964


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
        """Measures both on the same resampled texts.

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
        """Variance of the distance from a line of that slope, straight up."""
        of_entropy, both, of_log = self.covariance
        return of_log - 2.0 * slope * both + slope * slope * of_entropy


def excess(place: Place, curve: Sequence[Place]) -> Figure:
    """Log perplexity of a point less that of the curve at the same entropy, with a 95 % interval.

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
            error = _Z * float(np.sqrt(max(0.0, variance)))
            return Figure(value, value - error, value + error)
    return UNDEFINED
