"""Decoding rules by the names that `--rule` and configs use.

A rule of your own is a subclass of `Rule` with a `kind`; `RULES.register(MyRule)` makes it known.
No rule imports torch before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from textdiff.errors import ConfigError
from textdiff.registry import Registry
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.rules.first_hitting import FirstHitting
from textdiff.sampling.rules.gibbs import Gibbs
from textdiff.sampling.rules.ordered import Confidence, EntropyBound, Threshold
from textdiff.sampling.rules.predictor_corrector import PredictorCorrector
from textdiff.sampling.rules.remask import Remask
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.scores import Euler, Tweedie

if TYPE_CHECKING:
    from textdiff.diffusion.family import Family

RULES: Registry[Rule] = Registry(
    "rule",
    [
        Ancestral,
        FirstHitting,
        Euler,
        Tweedie,
        Confidence,
        Threshold,
        EntropyBound,
        Remask,
        PredictorCorrector,
        Gibbs,
    ],
)


def check_rule(name: str, family: Family) -> None:
    """Refuse a rule that does not exist or does not fit a family.

    Raises:
        ConfigError: unknown rule, or one that is not defined for the family.
    """
    reason = RULES.build(name).refusal(family)
    if reason is not None:
        others = [other for other, rule in RULES.items() if rule.refusal(family) is None]
        raise ConfigError(
            f"rule {name} {reason}; rules for this model: {', '.join(others)}",
            code="unsuitable_rule",
        )


def build_rule(name: str, family: Family, knobs: Mapping[str, Any] | None = None) -> Rule:
    """Return a rule with some knobs set.

    Args:
        name: key of `RULES`.
        family: the model's.
        knobs: values by name; the others keep their defaults.

    Raises:
        ConfigError: unknown rule or knob, one that does not fit the family, a value out of range.
    """
    check_rule(name, family)
    return RULES.build(name, knobs).suited(family)


def check_likelihood(rule: Rule) -> None:
    """Refuse a rule under which a text has no exact likelihood.

    Raises:
        ConfigError: with the rule's own reason.
    """
    reason = rule.likelihood_refusal()
    if reason is not None:
        others = [name for name in RULES if RULES.build(name).likelihood_refusal() is None]
        raise ConfigError(
            f"a text has no exact likelihood under rule {rule.kind}: it {reason}; rules with one: "
            + ", ".join(others),
            code="no_exact_likelihood",
        )


__all__ = ["RULES", "Rule", "build_rule", "check_likelihood", "check_rule"]
