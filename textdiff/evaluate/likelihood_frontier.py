"""The suite `likelihood-frontier`: exact likelihood of held-out text against tokens per call.

A rule with an exact likelihood has one for any text, and a cost: the network calls that writing
this text takes. Every point of a grid is such a rule with its knobs and steps. No judge is needed,
and nothing is sampled: figures have errors over documents alone. Beside them stands the bound of
the same documents, which averages over orders. Every point has its difference from that bound, with
the error over documents of the difference. A grid is a list of settings, as of the suite
`frontier`:

    points:
      - {rule: confidence, order: [position, margin], steps: [4, 2, 1]}
      - {rule: threshold, threshold: [0.5, 0.9]}
    order_search: {documents: 64, beam: 16}

With `order_search` one more point writes in the best fixed order found on other
documents. They follow the scored ones in the reference.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError
from textdiff.evaluate.bound_record import result_origin
from textdiff.evaluate.fixed_order import CURVE, search_record, searched_setting, split_grid
from textdiff.evaluate.frontier import Setting, combinations
from textdiff.evaluate.likelihood_figure import draw_likelihood_frontier as draw_likelihood_frontier
from textdiff.evaluate.likelihood_figure import likelihood_lines
from textdiff.evaluate.suites import LEAST_TEXTS, Report, SuiteOptions, SuiteResult
from textdiff.evaluate.sweep_file import Point, Record, kept_points, save_points
from textdiff.likelihood.difference import compare
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators.policy import SHARED
from textdiff.models.half_blocks import dtype_name
from textdiff.sampling.rules import RULES, build_rule, check_rule


def likelihood_frontier(options: SuiteOptions, report: Report) -> SuiteResult:
    """Score the reference under every rule of a grid.

    Args:
        options: what to measure; a reference and an output are needed.
        report: called with progress.

    Raises:
        ConfigError: something is missing, or the output is of another sweep.
        DataError: texts that cannot be scored.
    """
    texts, reference, output = _inputs(options)
    model = options.model
    size = model.family.block_size or model.context
    search, grid = split_grid(options.grid or {})
    settings, left_out = read_points(grid or default_points(size), model.family)
    others = search.texts(reference[len(texts) :]) if search else []
    report("bound", 0, len(settings))
    bound = model.estimate(texts, seed=options.seed)
    record = _record(options, texts, bound)
    done = kept_points(output, record, _identity)
    for number, setting in enumerate(settings):
        report(setting.curve, number, len(settings))
        if setting.key not in done:
            done[setting.key] = _point(options, texts, setting, bound)
            save_points(output, record, done, {"complete": False})
    if search and (key := search.key(others)) not in done:
        report(CURVE, len(settings), len(settings))
        order = search.run(model, others)
        written = _point(options, texts, searched_setting(order), bound)
        done[key] = written | {"key": key, **search_record(search, order)}
    points = {setting.key: done[setting.key] for setting in settings} | done
    record = save_points(output, record, points, {"complete": True, "left_out": left_out})
    return SuiteResult(record, likelihood_lines(record))


def _inputs(options: SuiteOptions) -> tuple[list[str], Sequence[str], Path]:
    """Return the documents to score, all of the reference, and the output.

    Raises:
        ConfigError: something is missing, or there are too few documents.
    """
    output, reference = options.output, options.reference
    if output is None or reference is None or options.given:
        raise ConfigError(
            "the likelihood frontier scores held-out text and saves its points: give --reference "
            "and --output, and no --texts",
            code="frontier_needs_text",
        )
    texts = list(reference[: options.num_samples])
    if len(texts) < LEAST_TEXTS:
        raise ConfigError(
            f"{len(texts)} document(s) in the reference: give at least {LEAST_TEXTS}, errors come "
            "from their spread",
            code="too_few_texts",
        )
    return texts, reference, output


def default_points(size: int) -> dict[str, Any]:
    """Return a grid for any model, of every rule with an exact likelihood.

    Args:
        size: tokens of a block, or of the context of a full-sequence model.
    """
    few = sorted({max(1, size // n) for n in (8, 4, 2, 1)}, reverse=True)
    known: dict[str, list[dict[str, Any]]] = {
        "confidence": [{"order": ["position", "probability", "margin", "entropy"], "steps": few}],
        "threshold": [{"threshold": [0.5, 0.7, 0.9, 0.98], "steps": size}],
        "entropy_bound": [{"entropy_bound": [0.1, 0.5, 1.0, 2.0, 4.0], "steps": size}],
    }
    exact = [name for name in RULES if RULES.build(name).likelihood_refusal() is None]
    return {
        "points": [
            {"rule": name, **entry} for name in exact for entry in known.get(name, [{"steps": few}])
        ]
    }


def read_points(content: Mapping[str, Any], family: Family) -> tuple[list[Setting], dict[str, str]]:
    """Check a grid and multiply it out.

    Returns:
        The points, and the rules that do not fit the family or have no likelihood, with the reason.

    Raises:
        ConfigError: a grid of another shape, an unknown rule or key, a value out of range.
    """
    entries = content.get("points")
    if set(content) != {"points"} or not isinstance(entries, list) or not entries:
        raise ConfigError(
            "grid: write `points`, a list of entries with a rule each, such as {rule: confidence, "
            "steps: [4, 2], order: margin}, `order_search` or both, and nothing else",
            code="grid_shape",
        )
    settings: dict[str, Setting] = {}
    left_out: dict[str, str] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or "rule" not in entry:
            raise ConfigError(f"grid: {entry!r:.60} has no rule", code="grid_shape")
        for setting in combinations(entry):
            rule, knobs = setting.options["rule"], setting.options["knobs"]
            built = RULES.build(rule, knobs)
            if reason := built.refusal(family) or built.likelihood_refusal():
                left_out[rule] = reason
            else:
                build_rule(rule, family, knobs)
                settings.setdefault(setting.key, setting)
    if not settings:
        check_rule(entries[0]["rule"], family)
        raise ConfigError(
            "grid: none of its rules has an exact likelihood: "
            + "; ".join(f"{rule} {reason}" for rule, reason in left_out.items()),
            code="no_exact_likelihood",
        )
    return list(settings.values()), left_out


def _point(options: SuiteOptions, texts: list[str], setting: Setting, bound: Estimates) -> Point:
    """Score the texts under one setting."""
    common = {name: options.options[name] for name in SHARED if options.options.get(name)}
    chosen = common | {"steps": options.options.get("steps"), **setting.options}
    estimates = options.model.estimate(texts, estimator="policy", **chosen)
    exact = estimates.bound()
    words = [value for value in setting.options["knobs"].values() if isinstance(value, str)]
    point: Point = {
        "key": setting.key,
        "curve": setting.curve,
        "line": " ".join([str(setting.options["rule"]), *words]),
        "options": {name: value for name, value in chosen.items() if value is not None},
        "tokens_per_call": 1.0 / (estimates.calls_per_token or 1.0),
        "nats": exact.to_dict()["mean"],
        "text_stderr": exact.text_stderr,
        "impossible": exact.impossible,
        "over_bound": None,
    }
    if not exact.impossible:
        difference = compare(estimates, bound)
        point["over_bound"] = {
            "nats": difference.mean,
            "stderr": difference.stderr,
            "text_stderr": difference.text_stderr,
        }
    return point


def _record(options: SuiteOptions, texts: list[str], bound: Estimates) -> dict[str, Any]:
    """Return everything that the points have in common."""
    model = options.model
    return {
        "suite": "likelihood-frontier",
        "model": options.name,
        "seed": options.seed,
        "documents": len(texts),
        "block_size": model.family.block_size,
        "dtype": dtype_name(model.model),
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "common": {name: v for name in SHARED if (v := options.options.get(name))},
        "bound": asdict(bound.bound()),
        "provenance": result_origin(model, command=list(options.command)),
    }


def _identity(record: Record) -> dict[str, Any]:
    """Return what two parts of one sweep have in common, by the names that a message uses."""
    shared = ("block_size", "dtype", "seed", "common")
    return {
        "the model's weights": record["provenance"]["model_sha256"],
        "the reference": record["text_sha256"],
        **{name: record[name] for name in shared},
    }
