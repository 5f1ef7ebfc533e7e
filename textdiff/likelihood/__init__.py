"""Perplexity bounds: estimators, their errors, and what exactly is scored.

Names are imported on first use, so that the command line can list estimators without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textdiff.likelihood.bound import Bound
    from textdiff.likelihood.difference import Difference, compare, compare_models, paired
    from textdiff.likelihood.estimates import Estimates
    from textdiff.likelihood.replicates import estimate
    from textdiff.likelihood.windows import Windows, cut_windows

_HOME = {
    "Bound": "bound",
    "Difference": "difference",
    "Estimates": "estimates",
    "Windows": "windows",
    "compare": "difference",
    "compare_models": "difference",
    "cut_windows": "windows",
    "estimate": "replicates",
    "paired": "difference",
}

__all__ = [
    "Bound",
    "Difference",
    "Estimates",
    "Windows",
    "compare",
    "compare_models",
    "cut_windows",
    "estimate",
    "paired",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
