"""Intervals over texts: how far a figure would move with other texts of the same source.

A figure of T texts is written as a statistic of how often each of them counts. Once each gives the
figure; random halves of them, drawn without replacement, give its spread: that of half the texts
within a finite set is that of all of them among their kind (half-sample bootstrap; Shao and Wu,
1989, for statistics that are no means). Draws with replacement would repeat texts, which alone
lowers the share of distinct n-grams and makes its spread one of how many texts were drawn twice.
Percentiles of the halves' figures are moved to the figure, since a pooled entropy of half the text
is lower by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
"""[B, T] how often each text counts in each of B sets."""

Statistic = Callable[[Weights], NDArray[np.float64]]
"""Figures [B] of B sets of the texts it was made for."""

CONFIDENCE = 0.95


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
