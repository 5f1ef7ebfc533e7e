"""Estimators by the names that users give; one file each."""

from dataclasses import fields
from typing import Any

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, closest
from textdiff.likelihood.estimators.any_order import AnyOrder
from textdiff.likelihood.estimators.balanced import Balanced
from textdiff.likelihood.estimators.chain_rule import ChainRule
from textdiff.likelihood.estimators.estimator import Estimator
from textdiff.likelihood.estimators.exact import Exact
from textdiff.likelihood.estimators.finite_t import FiniteT
from textdiff.likelihood.estimators.importance import Importance
from textdiff.likelihood.estimators.masked_count import MaskedCount
from textdiff.likelihood.estimators.time import Time

ESTIMATORS: dict[str, type[Estimator]] = {
    "masked_count": MaskedCount,
    "balanced": Balanced,
    "time": Time,
    "finite_t": FiniteT,
    "any_order": AnyOrder,
    "importance": Importance,
    "chain_rule": ChainRule,
    "exact": Exact,
}

COUNTS = ("samples", "orders", "timesteps")
"""Options that are whole numbers of at least 1."""


def default_estimator(family: Family) -> str:
    """The estimator that a family is scored with unless told otherwise."""
    return "masked_count" if family.timesteps is None else "finite_t"


def build_estimator(name: str, **options: Any) -> Estimator:
    """An estimator with its options; those that are None keep their defaults.

    Raises:
        ConfigError: no such estimator, an option that it does not have, or a value out of range.
    """
    if name not in ESTIMATORS:
        raise ConfigError(f"unknown estimator {name!r}; {closest(name, ESTIMATORS)}")
    given = {key: value for key, value in options.items() if value is not None}
    known = [f.name for f in fields(ESTIMATORS[name]) if f.init and not f.name.startswith("_")]
    for key in given:
        if key not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"{key} is no option of estimator {name}; {has}")
        if key in COUNTS and not (isinstance(given[key], int) and given[key] >= 1):
            raise ConfigError(f"{key} {given[key]!r}: give a whole number of at least 1")
    return ESTIMATORS[name](**given)


__all__ = ["ESTIMATORS", "Estimator", "build_estimator", "default_estimator"]
