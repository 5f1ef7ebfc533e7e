"""Perplexity bounds: estimators, their errors, and what exactly is scored."""

from textdiff.likelihood.bound import Bound
from textdiff.likelihood.estimators import Estimates, masked_count
from textdiff.likelihood.protocols import Windows, cut_windows
from textdiff.likelihood.terms import Batch, PositionTerms, corrupt

__all__ = [
    "Batch",
    "Bound",
    "Estimates",
    "PositionTerms",
    "Windows",
    "corrupt",
    "cut_windows",
    "masked_count",
]
