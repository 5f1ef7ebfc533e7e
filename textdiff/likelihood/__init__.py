"""Perplexity bounds: estimators, their errors, and what exactly is scored."""

from textdiff.likelihood.bound import Bound
from textdiff.likelihood.difference import Difference, compare, paired
from textdiff.likelihood.estimate import estimate
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.windows import Windows, cut_windows

__all__ = [
    "ESTIMATORS",
    "Bound",
    "Difference",
    "Estimates",
    "Windows",
    "compare",
    "cut_windows",
    "estimate",
    "paired",
]
