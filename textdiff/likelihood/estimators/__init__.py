"""Estimators of a bound, by the names that users write.

`ESTIMATORS.register(MyEstimator)` adds another. Nothing here imports torch before it is needed, so
that `--help` can list names, summaries and options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textdiff.likelihood.estimators.balanced import Balanced
from textdiff.likelihood.estimators.estimator import Estimator
from textdiff.likelihood.estimators.noise_levels import FiniteT, MaskedCount, Time
from textdiff.likelihood.estimators.orders import AnyOrder, ChainRule, Exact, Importance
from textdiff.likelihood.estimators.policy import Policy
from textdiff.registry import Registry

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family

ESTIMATORS = Registry[Estimator](
    "estimator",
    [MaskedCount, Balanced, Time, FiniteT, AnyOrder, Importance, ChainRule, Policy, Exact],
)

DEFAULT, DEFAULT_IN_STEPS = "masked_count", "finite_t"


def default_estimator(family: Family) -> str:
    """Return the name of the estimator that a family is scored with by default."""
    return DEFAULT if family.timesteps is None else DEFAULT_IN_STEPS


def build_estimator(name: str, **options: Any) -> Estimator:
    """Return an estimator with its options; those that are None keep their defaults.

    Raises:
        ConfigError: unknown estimator or option, or a value out of range.
    """
    return ESTIMATORS.build(name, {k: v for k, v in options.items() if v is not None})
