"""The grid of a sweep: which settings texts are sampled under.

    baseline: {rule: first_hitting, temperature: [0.7, 0.8, 0.9, 1.0]}
    points:
      - {rule: ancestral, steps: [16, 32], temperature: [0.8, 1.0]}
      - {rule: threshold, threshold: [0.5, 0.9], temperature: 1.0}

Every value is one or a list, and an entry stands for all combinations of its lists. Keys are the
settings of a generation and the rule's own knobs. The baseline's points form the curve that the
others are compared with at equal entropy, so it should be the slowest setting there is.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, closest
from textdiff.sampling.rules import RULES, build_rule, check_rule
from textdiff.sampling.settings import SamplingConfig

SETTINGS = ("rule", "steps", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1)


@dataclass(frozen=True)
class Setting:
    """One point of a sweep.

    Attributes:
        options: of `TextDiffusion.generate`, `rule` and `knobs` among them.
        baseline: whether it belongs to the curve that others are compared with.
    """

    options: Mapping[str, Any]
    baseline: bool = False

    @property
    def key(self) -> str:
        """What tells it from other points."""
        knobs = dict(sorted(self.options["knobs"].items()))
        parts = {name: self.options.get(name) for name in SETTINGS}
        return json.dumps(parts | {"knobs": knobs, "baseline": self.baseline})

    @property
    def curve(self) -> str:
        """Its rule, knobs and steps; settings that differ by temperature alone are one curve."""
        rule = str(self.options["rule"])
        knobs = self.options["knobs"].items()
        words = [f"{value}" if name == rule else f"{name} {value}" for name, value in knobs]
        for name in SETTINGS[3:]:
            words += [f"{name} {self.options[name]}"] if self.options.get(name) else []
        steps = self.options.get("steps")
        words += [f"{steps} steps"] if steps is not None else []
        return ", ".join([" ".join([rule, *words[:1]]) if knobs else rule, *words[bool(knobs) :]])


@dataclass(frozen=True)
class Grid:
    """The points of a sweep, and the rules that were asked for and do not fit, with the reason."""

    settings: list[Setting]
    left_out: Mapping[str, str]


def default_grid(family: Family, length: int) -> dict[str, Any]:
    """A grid for any model: few steps and many, and the rules that set their own pace.

    Args:
        family: the model's; a full-sequence one has no end of steps but its length.
        length: tokens of a text, or of a block.
    """
    slow: dict[str, Any] = {"rule": "first_hitting"}
    if RULES["first_hitting"].refusal(family):
        slow = {"rule": "ancestral", "steps": 8 * length}
    few = sorted({max(1, length // n) for n in (8, 4, 2)})
    warm = [0.8, 1.0]
    return {
        "baseline": {**slow, "temperature": list(TEMPERATURES)},
        "points": [
            {"rule": "ancestral", "steps": [*few, length], "temperature": warm},
            {"rule": "tweedie", "steps": few, "temperature": warm},
            {"rule": "confidence", "steps": few, "temperature": warm},
            {"rule": "threshold", "steps": length, "threshold": [0.5, 0.7, 0.9]}
            | {"temperature": warm},
            {"rule": "entropy_bound", "steps": length, "entropy_bound": [0.1, 0.5, 2.0]}
            | {"temperature": warm},
            {"rule": "remask", "steps": length, "temperature": warm},
            {"rule": "predictor_corrector", "steps": [*few, length], "temperature": warm},
        ],
    }


def read_grid(content: Mapping[str, Any], family: Family) -> Grid:
    """Checks a grid and multiplies it out.

    Args:
        content: as in the module's example.
        family: the model's; rules that do not fit it are left out.

    Raises:
        ConfigError: a grid of another shape, an unknown rule or key, a value out of range, or a
            baseline that does not fit the model.
    """
    unknown = sorted(set(content) - {"baseline", "points"})
    if unknown:
        raise ConfigError(f"grid: unknown key {unknown[0]!r}; known: baseline, points")
    base, points = content.get("baseline"), content.get("points", [])
    entries = [base, *(points if isinstance(points, list) else [None])]
    if not all(isinstance(entry, Mapping) and "rule" in entry for entry in entries):
        raise ConfigError(
            "grid: `baseline` is one entry and `points` a list of them, each with a rule: "
            "{rule: ancestral, steps: [16, 32], temperature: 1.0}"
        )
    settings: dict[str, Setting] = {}
    left_out: dict[str, str] = {}
    for index, entry in enumerate(entries):
        for setting in _settings(entry, baseline=index == 0):
            rule = setting.options["rule"]
            reason = RULES[rule].refusal(family) if rule in RULES else None
            if reason is None or index == 0:
                check_rule(rule, family)
                build_rule(rule, family, setting.options["knobs"])
                settings.setdefault(setting.key, setting)
            else:
                left_out[rule] = reason
    return Grid(list(settings.values()), left_out)


def _settings(entry: Mapping[str, Any], baseline: bool) -> Iterator[Setting]:
    """All combinations of an entry's lists."""
    columns = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in product(*columns):
        chosen = dict(zip(entry, values, strict=True))
        rule = str(chosen["rule"])
        knobs = {key: value for key, value in chosen.items() if key not in SETTINGS}
        known = {*SETTINGS, *(RULES[rule].knobs() if rule in RULES else knobs)}
        for knob in knobs:
            if knob not in known:
                raise ConfigError(f"grid: {rule} has no setting {knob!r}; {closest(knob, known)}")
        options = {key: value for key, value in chosen.items() if key in SETTINGS}
        SamplingConfig().merge(**options)  # refuses values before anything is sampled
        yield Setting({**options, "rule": rule, "knobs": knobs}, baseline)
