"""The suite `frontier`: perplexity against entropy, and the cost of tokens per network call.

A lower temperature buys a lower perplexity with entropy, so settings are compared at equal entropy:
the baseline's points, one token per call at several temperatures, form a curve, and the *excess* of
any other point is its log perplexity less the curve's at the same entropy. A rule that writes
several tokens per call at an excess of 0 does so for nothing.

Every finished point is saved; a sweep that is started again goes on from there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.bootstrap import UNDEFINED, Figure, Statistic, Weights, resample
from textdiff.evaluate.grid import Setting, default_grid, read_grid
from textdiff.evaluate.result_tables import frontier_lines
from textdiff.evaluate.single_setting import (
    common_record,
    digest,
    judged,
    reference_pieces,
    text_figures,
)
from textdiff.evaluate.suites import Report, SuiteOptions, SuiteResult
from textdiff.evaluate.text_metrics import LOG_PPL, TEXT_ENTROPY, Subject, measure
from textdiff.storage import whole_file

Point = dict[str, Any]

_Z = 1.959964


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
    grid = read_grid(content, options.model.family)
    record: dict[str, Any] = {"suite": "frontier", "model": options.name, **common_record(options)}
    weights = resample(options.num_samples, options.resamples, options.seed)
    real, _ = reference_pieces(options, options.num_samples)
    assert real is not None
    record["sampling"] = options.settings({})
    record["reference"] = text_figures(options, real, weights, report)
    record["reference"]["text_sha256"] = digest(reference)
    done = _kept(output, record)
    for number, setting in enumerate(grid.settings):
        report(setting.curve, number, len(grid.settings))
        if setting.key not in done:
            done[setting.key] = _point(options, setting, weights, report)
            _save(output, record, done, {"complete": False})
    # Points of an earlier grid stay, after the ones of this.
    points = {setting.key: done[setting.key] for setting in grid.settings} | done
    _add_excess(points)
    record = _save(output, record, points, {"complete": True, "left_out": grid.left_out})
    return SuiteResult(record, frontier_lines(record))


def _point(options: SuiteOptions, setting: Setting, weights: Weights, report: Report) -> Point:
    """Sample and measure one setting."""
    texts, tokens_per_call = options.sample(setting.options)
    subject = Subject(texts, judged(options, texts, report))
    entropy, log_ppl = TEXT_ENTROPY(subject), LOG_PPL(subject)
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

    def place(point: Point) -> Place:
        return Place(**{**point["place"], "covariance": tuple(point["place"]["covariance"])})

    curve = [place(point) for point in points.values() if point["baseline"]]
    for point in points.values():
        point["excess"] = None if point["baseline"] else excess(place(point), curve).to_dict()


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


def _kept(path: Path, record: Mapping[str, Any]) -> dict[str, Point]:
    """Return the points that an earlier part of the sweep has finished.

    Raises:
        ConfigError: the file is of another sweep, or no sweep at all.
    """
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        before, points = _identity(saved), {p["key"]: p for p in saved["points"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--output {path} exists and is not a sweep of this version; choose another file"
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
    """Write the sweep so far, whole or not at all."""
    whole = {**record, **more, "points": list(points.values())}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {path} cannot be written ({error.strerror})") from None
    return whole


@dataclass(frozen=True)
class Place:
    """A measured point.

    Attributes:
        entropy: nats.
        log_ppl: nats per judge token.
        covariance: of the two over resampled texts: (var entropy, covariance, var log_ppl).
    """

    entropy: float
    log_ppl: float
    covariance: tuple[float, float, float]

    @classmethod
    def of(cls, entropy: Statistic, log_ppl: Statistic, weights: Weights) -> "Place":
        """Measure both on the same resampled texts.

        Args:
            entropy: of the texts.
            log_ppl: of the texts.
            weights: [B, T] halves of them.
        """
        once = np.ones((1, weights.shape[1]))
        half = weights.shape[1] // 2
        scale = half / (weights.shape[1] - half)
        spread = scale * np.cov(np.stack([entropy(weights), log_ppl(weights)]))
        cells = (float(spread[0, 0]), float(spread[0, 1]), float(spread[1, 1]))
        return cls(float(entropy(once)[0]), float(log_ppl(once)[0]), cells)

    def variance(self, slope: float) -> float:
        """Return the variance of the vertical distance from a line of that slope."""
        of_entropy, both, of_log = self.covariance
        return of_log - 2.0 * slope * both + slope * slope * of_entropy


def excess(place: Place, curve: Sequence[Place]) -> Figure:
    """Return a point's log perplexity less the curve's at its entropy, with a 95 % interval.

    The curve is drawn straight between its points. Errors of the point and of the two ends of its
    segment count as independent; with common random numbers they are less than that.

    Args:
        place: the point.
        curve: points of the curve, in any order.

    Returns:
        Nats per judge token; NaN where the curve does not reach.
    """
    ordered = sorted(curve, key=lambda p: p.entropy)
    for left, right in pairwise(ordered):
        if left.entropy <= place.entropy <= right.entropy and left.entropy < right.entropy:
            share = (place.entropy - left.entropy) / (right.entropy - left.entropy)
            slope = (right.log_ppl - left.log_ppl) / (right.entropy - left.entropy)
            value = place.log_ppl - (1 - share) * left.log_ppl - share * right.log_ppl
            variance = place.variance(slope)
            variance += (1 - share) ** 2 * left.variance(slope)
            variance += share**2 * right.variance(slope)
            error = _Z * float(np.sqrt(max(0.0, variance)))
            return Figure(value, value - error, value + error)
    return UNDEFINED
