"""The suite `generation`: texts of one setting, measured beside real text."""

import hashlib
from collections.abc import Sequence
from typing import Any

from textdiff.evaluate.bound_record import result_origin
from textdiff.evaluate.figures import CONFIDENCE, Weights, cluster, mauve, resample
from textdiff.evaluate.judges import Judgement
from textdiff.evaluate.presentation import table
from textdiff.evaluate.suites import (
    Report,
    SuiteOptions,
    SuiteResult,
    TextSet,
    real_pieces,
    text_set_of,
)
from textdiff.evaluate.text_metrics import Subject, length_quantiles, measure

_EXAMPLES = 3


def generation(options: SuiteOptions, report: Report) -> SuiteResult:
    """Measure sampled or given texts, and real ones cut alike.

    Args:
        options: what to measure, and by what.
        report: called with progress.

    Raises:
        ConfigError: options that the model refuses, or a judge that cannot do what is asked.
        DataError: texts that cannot be measured, or too few real ones.
    """
    record: dict[str, Any] = {"suite": "generation", "model": options.name}
    if options.given is None:
        report("sampling", 0, options.num_samples)
        texts, tokens_per_call = options.sample({})
        record |= {"sampling": options.settings({}), "tokens_per_call": tokens_per_call}
    else:
        texts = text_set_of(options.model, options.given)
        record |= {"sampling": None, "tokens_per_call": None}
    weights = resample(len(texts), options.resamples, options.seed)
    record |= common_record(options) | {"samples": text_figures(options, texts, weights, report)}
    real, others = reference_pieces(options, len(texts))
    if real is not None:
        record["reference"] = text_figures(options, real, weights, report)
        record["reference"]["text_sha256"] = digest(options.reference or [])
    record["mauve"] = None
    if options.mauve and real is not None:
        record["mauve"] = _mauve(options, texts, real, others, report)
    return SuiteResult(record, table(record))


def reference_pieces(options: SuiteOptions, count: int) -> tuple[TextSet | None, TextSet | None]:
    """Return pieces of real text to set beside `count` texts, and others to compare these with."""
    if options.reference is None:
        return None, None
    least = int(options.options.get("min_new_tokens") or options.model.defaults.min_new_tokens)
    return real_pieces(options.model, options.reference, options.length, count, least)


def text_figures(
    options: SuiteOptions, texts: TextSet, weights: Weights, report: Report
) -> dict[str, Any]:
    """Return all figures of a set of texts as plain data."""
    judgement = judged(options, texts, report)
    figures = measure(Subject(texts, judgement), weights)
    return {
        "texts": len(texts),
        "empty": sum(not ids for ids in texts.tokens),
        "figures": {name: figure.to_dict() for name, figure in figures.items()},
        "lengths": length_quantiles(texts),
        "judge_tokens": None if judgement is None else int(judgement.tokens.sum()),
        "longer_than_judge": None if judgement is None else judgement.windowed,
        "lossy_for_judge": None if judgement is None else judgement.lossy,
        "texts_sha256": digest(texts.texts),
        "examples": texts.texts[:_EXAMPLES],
    }


def judged(options: SuiteOptions, texts: TextSet, report: Report) -> Judgement | None:
    """Return the likelihoods of texts under the judge, if there is one."""
    if options.judge is None:
        return None
    return options.judge.judge(texts.texts, lambda done, total: report("judging", done, total))


def common_record(options: SuiteOptions) -> dict[str, Any]:
    """Return what every suite's result depends on."""
    return {
        "length": options.length,
        "seed": options.seed,
        "resamples": options.resamples,
        "confidence": CONFIDENCE,
        "judge": None if options.judge is None else options.judge.record(),
        "provenance": result_origin(options.model, command=list(options.command)),
    }


def digest(texts: Sequence[str]) -> str:
    """Return the SHA-256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _mauve(
    options: SuiteOptions, texts: TextSet, real: TextSet, others: TextSet | None, report: Report
) -> dict[str, Any]:
    """Return MAUVE of the texts against real ones, and of other real ones against these."""
    assert options.judge is not None
    judge = options.judge

    def features(of: TextSet) -> Any:
        return judge.features(of.texts, lambda done, total: report("reading", done, total))

    truth = features(real)
    figures: dict[str, Any] = {"samples": None, "reference": None}
    for name, side in (("samples", texts), ("reference", others)):
        if side is not None:
            histograms = cluster(features(side), truth, options.seed)
            figures[name] = mauve(histograms, options.resamples, options.seed).to_dict()
    return figures
