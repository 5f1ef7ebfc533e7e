"""Heavy tails: how skewed a mean of draws is, and when no interval may be stated for it.

Costs are skewed to the right. Where few draws carry much of a sum, a mean that missed them lies low
and so does its spread: Student's interval then misses the truth above. Two remedies follow.

*Moderate skewness* is corrected. The interval is that of Hall's transformation (1992, "On the
removal of skewness by transformation"), a monotone cubic of Student's ratio that takes its
first-order skewness out, where that reaches further than Student's: on the side of the tail.

*Doubt*: no interval is given. Either the draws themselves show a tail that is too heavy, or nothing
that few draws can show is enough. The second concerns objectives whose cost grows like the
exponential of the network's outputs, on texts that the network finds far less likely than random
tokens: it is confidently wrong, and the states where it is most wrong may be rarer than one draw in
as many as there are.
"""

import math
from dataclasses import dataclass

from torch import Tensor

LARGEST_CORRECTED = 0.4
"""Skewness of a mean that is corrected in full; beyond it the correction stays the same."""

LARGEST = 0.75
"""Skewness of a mean from which on its interval is in doubt: a draw or two carry its spread."""

LARGEST_WHEN_WORSE = 0.5
"""The same, where the text costs more than `WORSE` times what guessing does."""

WORSE = 1.5
"""Cost relative to that of guessing above which a network is taken to be confidently wrong."""

MANY_DRAWS = 4096
"""Draws that show the tail of such a network; fewer may all miss what it is made of."""


@dataclass(frozen=True)
class Tail:
    """Evidence of a mean's draws about its tail.

    Attributes:
        skewness: of the mean.
        draws: noise draws behind it.
        replicates: replicates that these draws come in.
        relative: the mean over what guessing costs; 0: the objective's costs have light tails.
    """

    skewness: float
    draws: int
    replicates: int
    relative: float = 0.0

    @property
    def doubt(self) -> str:
        """Reason why no interval can be given, and what to do; empty if one can."""
        if self.relative > WORSE and self.draws < MANY_DRAWS:
            needed = math.ceil(self.replicates * MANY_DRAWS / max(1, self.draws))
            return (
                f"the text costs {self.relative:.1f} times what guessing tokens at random does, so "
                "the network is confidently wrong, and rare draws may carry most of the cost; "
                f"{self.draws} draws do not show them: take at least {needed} replicates"
            )
        largest = LARGEST_WHEN_WORSE if self.relative > WORSE else LARGEST
        if abs(self.skewness) > largest:
            needed = math.ceil(self.replicates * (self.skewness / LARGEST_CORRECTED) ** 2)
            return (
                "a few draws carry most of the spread (the mean of all has a skewness of "
                f"{self.skewness:.2f}), and others like them may be missing: take at least "
                f"{needed} replicates"
            )
        return ""


def mean_skewness(values: Tensor, count: int | None = None) -> float:
    """Return the skewness of the mean of `count` replicates (None: of these) of independent cells.

    A replicate is the sum of its cells. The unbiased second and third cumulants of the cells are
    added up: with several cells this is more precise than from the sums.

    Args:
        values: [R, C] values of each cell in each replicate.
        count: replicates of the mean.

    Returns:
        0 for fewer than four replicates, and where nothing varies.
    """
    replicates = len(values)
    if replicates < 4:
        return 0.0
    away = values - values.mean(0)
    second = away.square().sum() / (replicates - 1)
    scale = values.abs().amax().clamp(min=1e-300) * 1e-12
    if not bool(second > scale.square()):
        return 0.0  # rounding
    third = away.pow(3).sum() * replicates / ((replicates - 1) * (replicates - 2))
    return float(third / second**1.5) / math.sqrt(count or replicates)


def skewed_ends(quantile: float, skewness: float) -> tuple[float, float]:
    """Return how far an interval reaches below and above the mean, in standard errors.

    It is never less than Student's.

    Args:
        quantile: Student's, for a mean without skewness.
        skewness: of the mean.
    """
    skewness = max(-LARGEST_CORRECTED, min(LARGEST_CORRECTED, skewness))
    below, above = _untransformed(quantile, skewness), -_untransformed(-quantile, skewness)
    return max(below, quantile), max(above, quantile)


def _untransformed(ratio: float, skewness: float) -> float:
    """Return the inverse of Hall's transformation of a studentised mean."""
    if abs(skewness) < 1e-6:
        return ratio
    cube = 1.0 + skewness * (ratio - skewness / 6.0)
    return 3.0 / skewness * (math.copysign(abs(cube) ** (1.0 / 3.0), cube) - 1.0)
