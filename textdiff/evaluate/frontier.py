"""The suite `frontier`: perplexity against entropy, and what tokens per network call cost.

A lower temperature buys a lower perplexity with entropy, so settings are compared at equal entropy:
the baseline's points, one token per call at several temperatures, form a curve, and the *excess* of
any other point is its log perplexity less the curve's at the same entropy. A rule that writes
several tokens per call at an excess of 0 does so for nothing.

Every finished point is saved; a sweep that is started again goes on from there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.bootstrap import Weights, resample
from textdiff.evaluate.excess import Place, excess
from textdiff.evaluate.generation import common_record, described, digest, judged, reference_pieces
from textdiff.evaluate.grid import Setting, default_grid, read_grid
from textdiff.evaluate.metrics import LOG_PPL, TEXT_ENTROPY, Subject, measure
from textdiff.evaluate.plan import Outcome, Plan, Tell
from textdiff.evaluate.report import frontier_lines
from textdiff.evaluate.sampled import sample, settings
from textdiff.storage import whole_file

Point = dict[str, Any]


def frontier(plan: Plan, tell: Tell) -> Outcome:
    """Samples and measures every point of a grid.

    Args:
        plan: what is asked for; it needs a judge, a reference and an output.
        tell: told what is being done.

    Raises:
        ConfigError: something is missing, or the output is of another sweep.
        DataError: texts that cannot be measured, or too few real ones.
    """
    if plan.judge is None or plan.reference is None or plan.output is None or plan.given:
        raise ConfigError(
            "the frontier needs a judge, real text as a reference and an output file, and samples "
            "its own texts: give --judge, --reference and --output, and no --texts"
        )
    block = plan.model.family.block_size or plan.length
    content = plan.grid or default_grid(plan.model.family, min(block, plan.length))
    grid = read_grid(content, plan.model.family)
    record: dict[str, Any] = {"suite": "frontier", "model": plan.name, **common_record(plan)}
    weights = resample(plan.num_samples, plan.resamples, plan.seed)
    real, _ = reference_pieces(plan, plan.num_samples)
    assert real is not None
    record["sampling"] = settings(plan, {})
    record["reference"] = described(plan, real, weights, tell)
    record["reference"]["text_sha256"] = digest(plan.reference)
    done = _kept(plan.output, record)
    for number, setting in enumerate(grid.settings):
        tell(setting.curve, number, len(grid.settings))
        if setting.key not in done:
            done[setting.key] = _point(plan, setting, weights, tell)
            _save(plan.output, record, done, {"complete": False})
    asked = {setting.key: done[setting.key] for setting in grid.settings}
    points = asked | done  # those of an earlier grid stay, after the ones of this
    _add_excess(points)
    record = _save(plan.output, record, points, {"complete": True, "left_out": grid.left_out})
    return Outcome(record, frontier_lines(record))


def _point(plan: Plan, setting: Setting, weights: Weights, tell: Tell) -> Point:
    """Samples and measures one setting."""
    found = sample(plan, setting.options)
    subject = Subject(found.texts, judged(plan, found.texts, tell))
    entropy, log_ppl = TEXT_ENTROPY(subject), LOG_PPL(subject)
    assert entropy is not None
    assert log_ppl is not None
    place = Place.of(entropy, log_ppl, weights)
    return {
        "key": setting.key,
        "curve": setting.curve,
        "baseline": setting.baseline,
        "sampling": settings(plan, setting.options),
        "tokens_per_call": found.tokens_per_call,
        "figures": {name: f.to_dict() for name, f in measure(subject, weights).items()},
        "place": {
            "entropy": place.entropy,
            "log_ppl": place.log_ppl,
            "covariance": list(place.covariance),
        },
        "texts_sha256": digest(found.texts.texts),
        "example": found.texts.texts[0],
    }


def _add_excess(points: Mapping[str, Point]) -> None:
    """Compares every point with the baseline's curve at its entropy."""

    def place(point: Point) -> Place:
        return Place(**{**point["place"], "covariance": tuple(point["place"]["covariance"])})

    curve = [place(point) for point in points.values() if point["baseline"]]
    for point in points.values():
        found = None if point["baseline"] else excess(place(point), curve)
        point["excess"] = None if found is None else found.to_dict()


def _identity(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two parts of one sweep have in common, by the names that a message uses."""
    shared = ("num_samples", "block_size", "dtype", "seed", "window", "stride")
    return {
        "the model's weights": record["provenance"]["model_sha256"],
        "the judge": {k: v for k, v in record["judge"].items() if k != "name"},
        "the reference": record["reference"]["texts_sha256"],
        "length": record["length"],
        "resamples": record["resamples"],
        **{name: record["sampling"][name] for name in shared},
    }


def _kept(path: Path, record: Mapping[str, Any]) -> dict[str, Point]:
    """The points that an earlier part of the sweep has finished.

    Raises:
        ConfigError: the file is of another sweep, or no sweep at all.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before, points = _identity(found), {p["key"]: p for p in found["points"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--output {path} exists and is no sweep of this version; choose another file"
        ) from None
    now = _identity(json.loads(json.dumps(record)))
    differing = [name for name, value in now.items() if before[name] != value]
    if differing:
        raise ConfigError(
            f"--output {path} holds another sweep: {differing[0]} differs; choose another file"
        )
    return points


def _save(
    path: Path, record: Mapping[str, Any], points: Mapping[str, Point], more: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the sweep so far, whole or not at all."""
    whole = {**record, **more, "points": list(points.values())}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {path} cannot be written ({error.strerror})") from None
    return whole
