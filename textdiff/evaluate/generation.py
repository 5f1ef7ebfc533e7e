"""The suite `generation`: texts of one setting, measured beside real text."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from textdiff.evaluate.bootstrap import CONFIDENCE, Weights, resample
from textdiff.evaluate.judge import Judgement
from textdiff.evaluate.mauve import cluster, mauve
from textdiff.evaluate.metrics import Subject, length_quantiles, measure
from textdiff.evaluate.plan import Outcome, Plan, Tell
from textdiff.evaluate.report import table
from textdiff.evaluate.sampled import sample, settings
from textdiff.evaluate.texts import Texts, given_texts, real_pieces
from textdiff.export.provenance import code_record, model_record

_EXAMPLES = 3


def generation(plan: Plan, tell: Tell) -> Outcome:
    """Measures sampled or given texts, and real ones cut alike.

    Args:
        plan: what is asked for.
        tell: told what is being done.

    Raises:
        ConfigError: options that the model refuses, or a judge that cannot do what is asked.
        DataError: texts that cannot be measured, or too few real ones.
    """
    record: dict[str, Any] = {"suite": "generation", "model": plan.name}
    if plan.given is None:
        tell("sampling", 0, plan.num_samples)
        found = sample(plan, {})
        texts = found.texts
        record |= {"sampling": settings(plan, {}), "tokens_per_call": found.tokens_per_call}
    else:
        texts = given_texts(plan.model, plan.given)
        record |= {"sampling": None, "tokens_per_call": None}
    weights = resample(len(texts), plan.resamples, plan.seed)
    record |= common_record(plan) | {"samples": described(plan, texts, weights, tell)}
    real, others = reference_pieces(plan, len(texts))
    if real is not None:
        record["reference"] = described(plan, real, weights, tell)
        record["reference"]["text_sha256"] = digest(plan.reference or [])
    record["mauve"] = None
    if plan.mauve and real is not None:
        record["mauve"] = _mauve(plan, texts, real, others, tell)
    return Outcome(record, table(record))


def reference_pieces(plan: Plan, count: int) -> tuple[Texts | None, Texts | None]:
    """Pieces of real text to stand beside `count` texts, and others to compare them with."""
    if plan.reference is None:
        return None, None
    least = int(plan.options.get("min_new_tokens") or plan.model.defaults.min_new_tokens)
    return real_pieces(plan.model, plan.reference, plan.length, count, least)


def described(plan: Plan, texts: Texts, weights: Weights, tell: Tell) -> dict[str, Any]:
    """All figures of a set of texts as plain data."""
    judgement = judged(plan, texts, tell)
    figures = measure(Subject(texts, judgement), weights)
    return {
        "texts": len(texts),
        "empty": sum(not ids for ids in texts.tokens),
        "figures": {name: found.to_dict() for name, found in figures.items()},
        "lengths": length_quantiles(texts),
        "judge_tokens": None if judgement is None else int(judgement.tokens.sum()),
        "longer_than_judge": None if judgement is None else judgement.windowed,
        "lossy_for_judge": None if judgement is None else judgement.lossy,
        "texts_sha256": digest(texts.texts),
        "examples": texts.texts[:_EXAMPLES],
    }


def judged(plan: Plan, texts: Texts, tell: Tell) -> Judgement | None:
    """What the plan's judge makes of texts."""
    if plan.judge is None:
        return None
    return plan.judge.judge(texts.texts, lambda done, total: tell("judging", done, total))


def common_record(plan: Plan) -> dict[str, Any]:
    """What every suite's result depends on."""
    device = plan.model.model.device
    gpu = device.type == "cuda"
    return {
        "length": plan.length,
        "seed": plan.seed,
        "resamples": plan.resamples,
        "confidence": CONFIDENCE,
        "judge": None if plan.judge is None else plan.judge.record(),
        "provenance": {
            **model_record(plan.model.folder),
            "code": code_record(),
            "device": torch.cuda.get_device_name(device) if gpu else device.type,
            "command": list(plan.command),
        },
    }


def digest(texts: Sequence[str]) -> str:
    """The SHA-256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _mauve(
    plan: Plan, texts: Texts, real: Texts, others: Texts | None, tell: Tell
) -> dict[str, Any]:
    """MAUVE of the texts against real ones, and of other real ones against these."""
    assert plan.judge is not None
    judge = plan.judge

    def features(of: Texts) -> Any:
        return judge.features(of.texts, lambda done, total: tell("reading", done, total))

    truth = features(real)
    found: dict[str, Any] = {"samples": None, "reference": None}
    for name, side in (("samples", texts), ("reference", others)):
        if side is not None:
            histograms = cluster(features(side), truth, plan.seed)
            found[name] = mauve(histograms, plan.resamples, plan.seed).to_dict()
    return found
