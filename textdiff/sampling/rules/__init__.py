"""Decoding rules by the names that `--rule` and configs use; one file each."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, closest
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.rules.confidence import Confidence
from textdiff.sampling.rules.entropy_bound import EntropyBound
from textdiff.sampling.rules.euler import Euler
from textdiff.sampling.rules.first_hitting import FirstHitting
from textdiff.sampling.rules.predictor_corrector import PredictorCorrector
from textdiff.sampling.rules.remask import Remask
from textdiff.sampling.rules.rule import Rule
from textdiff.sampling.rules.threshold import Threshold
from textdiff.sampling.rules.tweedie import Tweedie

ancestral = Ancestral()
first_hitting = FirstHitting()

RULES: dict[str, Rule] = {
    "ancestral": ancestral,
    "first_hitting": first_hitting,
    "euler": Euler(),
    "tweedie": Tweedie(),
    "confidence": Confidence(),
    "threshold": Threshold(),
    "entropy_bound": EntropyBound(),
    "remask": Remask(),
    "predictor_corrector": PredictorCorrector(),
}
"""Every rule with its knobs at their defaults."""


def refuse(name: str, family: Family) -> None:
    """Stops whoever asks for a rule that does not exist or does not fit.

    Raises:
        ConfigError: unknown rule, or one that is not defined for the family.
    """
    if name not in RULES:
        raise ConfigError(f"unknown decoding rule {name!r}; {closest(name, RULES)}")
    reason = RULES[name].refusal(family)
    if reason is not None:
        others = [other for other, rule in RULES.items() if rule.refusal(family) is None]
        raise ConfigError(f"rule {name} {reason}; rules for this model: {', '.join(others)}")


def build_rule(name: str, family: Family, knobs: Mapping[str, Any] | None = None) -> Rule:
    """The rule of that name with some knobs set.

    Args:
        name: key of `RULES`.
        family: the model's.
        knobs: values by name; those that are not given keep their defaults.

    Raises:
        ConfigError: unknown rule or knob, one that does not fit the family, a value out of range.
    """
    refuse(name, family)
    known = [field.name for field in fields(RULES[name])]
    for knob in knobs or {}:
        if knob not in known:
            hint = closest(knob, known) if known else "it has none"
            raise ConfigError(f"rule {name} has no knob {knob!r}; {hint}")
    return replace(RULES[name], **dict(knobs or {})).suited(family)


__all__ = [
    "RULES",
    "Rule",
    "ancestral",
    "build_rule",
    "first_hitting",
    "refuse",
]
