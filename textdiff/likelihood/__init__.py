"""Perplexity bounds: estimators, their errors, and what exactly is scored."""

from textdiff.likelihood.bound import Bound
from textdiff.likelihood.compare import Difference, compare, paired
from textdiff.likelihood.estimate import estimate
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.protocols import Windows, cut_windows
from textdiff.likelihood.terms import Batch, PositionTerms, corrupt

__all__ = [
    "ESTIMATORS",
    "Batch",
    "Bound",
    "Difference",
    "Estimates",
    "PositionTerms",
    "Windows",
    "compare",
    "corrupt",
    "cut_windows",
    "estimate",
    "paired",
]
