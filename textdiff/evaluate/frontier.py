"""The suite `frontier`: perplexity against entropy, and the cost of tokens per network call.

A lower temperature buys a lower perplexity with entropy, so settings are compared at equal entropy.
The baseline's points, one token per call at several temperatures, form a curve. The *excess* of any
other point is its log perplexity less the curve's at the same entropy. A rule that writes several
tokens per call at an excess of 0 does so for nothing.

Every finished point is saved; a sweep that is started again goes on from there. A grid holds the
settings that texts are sampled under:

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
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError, closest
from textdiff.evaluate.figures import Place, Weights, excess, resample
from textdiff.evaluate.presentation import draw_frontier as draw_frontier
from textdiff.evaluate.presentation import frontier_lines
from textdiff.evaluate.single_setting import (
    common_record,
    digest,
    judged,
    reference_pieces,
    text_figures,
)
from textdiff.evaluate.suites import Report, SuiteOptions, SuiteResult
from textdiff.evaluate.sweep_file import Point, kept_points, save_points
from textdiff.evaluate.text_metrics import TEXT_ENTROPY, Subject, log_perplexity, measure
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
        """Key that distinguishes it from other points."""
        knobs = dict(sorted(self.options["knobs"].items()))
        parts = {name: self.options.get(name) for name in SETTINGS}
        return json.dumps(parts | {"knobs": knobs, "baseline": self.baseline})

    @property
    def curve(self) -> str:
        """Name of its rule, knobs and steps; settings that differ by temperature alone share it."""
        rule = str(self.options["rule"])
        knobs = self.options["knobs"].items()
        words = [f"{value}" if name == rule else f"{name} {value}" for name, value in knobs]
        for name in SETTINGS[3:]:
            words += [f"{name} {self.options[name]}"] if self.options.get(name) else []
        steps = self.options.get("steps")
        words += [f"{steps} steps"] if steps is not None else []
        return ", ".join([" ".join([rule, *words[:1]]) if knobs else rule, *words[bool(knobs) :]])


def default_grid(family: Family, length: int) -> dict[str, Any]:
    """Return a grid for any model: few steps and many, and rules that choose how many to reveal.

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


def read_grid(content: Mapping[str, Any], family: Family) -> tuple[list[Setting], dict[str, str]]:
    """Check a grid and multiply it out.

    Args:
        content: as in the module's example.
        family: the model's; rules that do not fit it are left out.

    Returns:
        The points, and the rules that do not fit with the reason.

    Raises:
        ConfigError: a grid of another shape, an unknown rule or key, a value out of range, or a
            baseline that does not fit the model.
    """
    unknown = sorted(set(content) - {"baseline", "points"})
    if unknown:
        raise ConfigError(
            f"grid: unknown key {unknown[0]!r}; known: baseline, points", code="unknown_grid_key"
        )
    base, points = content.get("baseline"), content.get("points", [])
    entries = [base, *(points if isinstance(points, list) else [None])]
    if not all(isinstance(entry, Mapping) and "rule" in entry for entry in entries):
        raise ConfigError(
            "grid: `baseline` is one entry and `points` a list of them, each with a rule: "
            "{rule: ancestral, steps: [16, 32], temperature: 1.0}",
            code="grid_shape",
        )
    settings: dict[str, Setting] = {}
    left_out: dict[str, str] = {}
    for index, entry in enumerate(entries):
        for setting in combinations(entry, baseline=index == 0):
            rule = setting.options["rule"]
            reason = RULES[rule].refusal(family) if rule in RULES else None
            if reason is None or index == 0:
                check_rule(rule, family)
                build_rule(rule, family, setting.options["knobs"])
                settings.setdefault(setting.key, setting)
            else:
                left_out[rule] = reason
    return list(settings.values()), left_out


def combinations(entry: Mapping[str, Any], baseline: bool = False) -> Iterator[Setting]:
    """Yield all combinations of an entry's lists."""
    columns = [value if isinstance(value, list) else [value] for value in entry.values()]
    for values in product(*columns):
        chosen = dict(zip(entry, values, strict=True))
        rule = str(chosen["rule"])
        knobs = {key: value for key, value in chosen.items() if key not in SETTINGS}
        known = {*SETTINGS, *(RULES[rule].knobs() if rule in RULES else knobs)}
        for knob in knobs:
            if knob not in known:
                raise ConfigError(
                    f"grid: {rule} has no setting {knob!r}; {closest(knob, known)}",
                    code="unknown_grid_setting",
                )
        options = {key: value for key, value in chosen.items() if key in SETTINGS}
        SamplingConfig().merge(**options)  # refuses values before anything is sampled
        yield Setting({**options, "rule": rule, "knobs": knobs}, baseline)


def frontier(options: SuiteOptions, report: Report) -> SuiteResult:
    """Sample and measure every point of a grid.

    Args:
        options: what to measure; a judge, a reference and an output are needed.
        report: called with progress.

    Raises:
        ConfigError: something is missing, or the output is of another sweep.
        DataError: texts that cannot be measured, or too few real ones.
    """
    judge, reference, output = options.judge, options.reference, options.output
    if judge is None or reference is None or output is None or options.given:
        raise ConfigError(
            "the frontier needs a judge, real text as a reference and an output file, and samples "
            "its own texts: give --judge, --reference and --output, and no --texts"
        )
    block = options.model.family.block_size or options.length
    content = options.grid or default_grid(options.model.family, min(block, options.length))
    settings, left_out = read_grid(content, options.model.family)
    record: dict[str, Any] = {"suite": "frontier", "model": options.name, **common_record(options)}
    weights = resample(options.num_samples, options.resamples, options.seed)
    real, _ = reference_pieces(options, options.num_samples)
    assert real is not None
    record["sampling"] = options.settings({})
    record["reference"] = text_figures(options, real, weights, report)
    record["reference"]["text_sha256"] = digest(reference)
    done = kept_points(output, record, _identity)
    for number, setting in enumerate(settings):
        report(setting.curve, number, len(settings))
        if setting.key not in done:
            done[setting.key] = _point(options, setting, weights, report)
            save_points(output, record, done, {"complete": False})
    # Points of an earlier grid stay, after the ones of this.
    points = {setting.key: done[setting.key] for setting in settings} | done
    _add_excess(points)
    record = save_points(output, record, points, {"complete": True, "left_out": left_out})
    return SuiteResult(record, frontier_lines(record))


def _point(options: SuiteOptions, setting: Setting, weights: Weights, report: Report) -> Point:
    """Sample and measure one setting."""
    texts, tokens_per_call = options.sample(setting.options)
    subject = Subject(texts, judged(options, texts, report))
    entropy, log_ppl = TEXT_ENTROPY(subject), log_perplexity(subject)
    assert entropy is not None
    assert log_ppl is not None
    place = Place.of(entropy, log_ppl, weights)
    return {
        "key": setting.key,
        "curve": setting.curve,
        "baseline": setting.baseline,
        "sampling": options.settings(setting.options),
        "tokens_per_call": tokens_per_call,
        "figures": {name: f.to_dict() for name, f in measure(subject, weights).items()},
        "place": asdict(place) | {"covariance": list(place.covariance)},
        "texts_sha256": digest(texts.texts),
        "example": texts.texts[0],
    }


def _add_excess(points: Mapping[str, Point]) -> None:
    """Compare every point with the baseline's curve at its entropy."""
    curve = [Place(**point["place"]) for point in points.values() if point["baseline"]]
    for point in points.values():
        own = None if point["baseline"] else excess(Place(**point["place"]), curve)
        point["excess"] = own and own.to_dict()


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two parts of one sweep have in common, by the names that a message uses."""
    shared = ("num_samples", "block_size", "dtype", "seed", "window", "stride")
    return {
        "the model's weights": record["provenance"]["model_sha256"],
        "the judge": {k: v for k, v in record["judge"].items() if k != "name"},
        "the reference": record["reference"]["texts_sha256"],
        "length": record["length"],
        "resamples": record["resamples"],
        **{name: record["sampling"][name] for name in shared},
    }
