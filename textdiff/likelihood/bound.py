"""A perplexity bound: the number, where it comes from, its errors and the tails of its draws.

Costs are skewed to the right. Where few draws carry much of a sum, a mean that missed them is too
low and so is its spread: Student's interval then misses the truth above. Two remedies follow.

*Moderate skewness* is corrected. The interval is that of Hall's transformation (1992, "On the
removal of skewness by transformation"), a monotone cubic of Student's ratio that takes its
first-order skewness out, where that reaches further than Student's: on the side of the tail.

*Doubt*: no interval is given. Either the draws themselves show a tail that is too heavy, or nothing
that few draws can show is enough. The second concerns objectives whose cost grows like the
exponential of the network's outputs, on texts that the network finds far less likely than random
tokens: it is confidently wrong. The states where it is most wrong may be rarer than one draw in as
many as there are.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

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


class WithError:
    """Base of a number with a Monte-Carlo error; subclasses have these fields."""

    mean: float
    stderr: float
    replicates: int
    skewness: float
    doubt: str

    @property
    def degrees(self) -> int:
        """Degrees of freedom of `stderr`."""
        return self.replicates - 1

    @property
    def is_reliable(self) -> bool:
        """True where the draws show enough of their tails for an error to be stated."""
        return not self.doubt

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of `mean` by Monte-Carlo error alone; NaN where it is in doubt.

        Student's t, corrected for skewness.
        """
        if self.stderr == 0.0:  # nothing random, or a single replicate of it
            return self.mean, self.mean
        if self.doubt:
            return math.nan, math.nan
        quantile = student_t_quantile(0.5 + confidence / 2, self.degrees)
        below, above = skewed_ends(quantile, self.skewness)
        return self.mean - below * self.stderr, self.mean + above * self.stderr


@dataclass(frozen=True)
class Bound(WithError):
    """An upper bound on -log p(text) per token.

    Attributes:
        mean: nats per token.
        stderr: Monte-Carlo standard error of `mean` for this text.
        text_stderr: standard error of `mean` over documents as a sample; None for one document.
        tokens: tokens scored (no special tokens, no padding).
        bytes: UTF-8 bytes of the scored text.
        documents: documents scored.
        estimator: name of the estimator.
        replicates: independent replicates that `mean` is of, and without a pilot `stderr`.
        terms: nats per token of each part; they add up to `mean`.
        is_bound: whether the expectation of `mean` is an upper bound.
        note: what keeps it from being one.
        lossy: documents whose text their tokens do not give back: what is bounded is what they give
            back, so it is not a bound on the text and has no figure per byte.
        pilot: further replicates that decided how many it takes; their spread is that of `stderr`,
            and they are not part of `mean`. 0: there were none.
        skewness: of `mean` as an estimate; its interval reaches further on that side.
        doubt: why neither `stderr` nor an interval can be trusted, and what to do; empty if they
            can.
        impossible: documents that a decoding rule never writes; their nats are infinite, and so is
            `mean`.
    """

    mean: float
    stderr: float
    text_stderr: float | None
    tokens: int
    bytes: int
    documents: int
    estimator: str
    replicates: int
    terms: Mapping[str, float] = field(default_factory=dict)
    is_bound: bool = True
    note: str = ""
    pilot: int = 0
    lossy: int = 0
    skewness: float = 0.0
    doubt: str = ""
    impossible: int = 0

    @property
    def degrees(self) -> int:
        """Degrees of freedom of `stderr`, whose spread is the pilot's if there is one."""
        return (self.pilot or self.replicates) - 1

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where a float cannot hold it."""
        return _exp(self.mean)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text: comparable between tokenizers. None where texts are lossy."""
        return None if self.lossy else self.mean * self.tokens / self.bytes / math.log(2.0)

    @property
    def bits_per_token(self) -> float:
        """Bits per token (per character for a character tokenizer)."""
        return self.mean / math.log(2.0)

    def perplexity_interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval as perplexities."""
        low, high = self.interval(confidence)
        return _exp(low), _exp(high)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, derived figures included; None for infinite ones.

        Errors in doubt are None too.
        """
        return asdict(self) | {
            "mean": finite(self.mean),
            "terms": {name: finite(nats) for name, nats in self.terms.items()},
            "stderr": self.stderr if self.is_reliable else None,
            "is_reliable": self.is_reliable,
            "perplexity": finite(self.perplexity),
            "bits_per_byte": self.bits_per_byte if self.mean < math.inf else None,
            "bits_per_token": finite(self.bits_per_token),
            "interval_95": [finite(end) for end in self.interval()],
            "perplexity_interval_95": [finite(end) for end in self.perplexity_interval()],
        }


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if math.isfinite(value) else None


def _exp(nats: float) -> float:
    """Return exp, infinite from about 709.8 on: diverged score networks cost thousands of nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@cache
def student_t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t for whole degrees of freedom, by bisection.

    The distribution function is the finite series of Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, degrees)
    low, high = 0.0, 1.0
    while _central_probability(high, degrees) < 2.0 * probability - 1.0:
        high *= 2.0
    for _ in range(80):
        middle = 0.5 * (low + high)
        inside = _central_probability(middle, degrees) < 2.0 * probability - 1.0
        low, high = (middle, high) if inside else (low, middle)
    return 0.5 * (low + high)


def _central_probability(t: float, degrees: int) -> float:
    """Return P(|T| < t)."""
    theta = math.atan2(t, math.sqrt(degrees))
    cos, sin = math.cos(theta), math.sin(theta)
    odd = degrees % 2 == 1
    term, total = (cos, 0.0) if odd else (1.0, 0.0)
    for power in range(1 if odd else 0, degrees - 1, 2):
        total += term
        term *= cos * cos * (power + 1) / (power + 2)
    return 2.0 / math.pi * (theta + sin * total) if odd else sin * total
