"""The writing of an export: its model, its model card and the record of its training."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from textdiff.config import Config
from textdiff.export.provenance import TRAINING_FILE, code_record
from textdiff.likelihood.bound import Bound
from textdiff.models.configuration import NEEDED
from textdiff.storage import whole_folder


def write_export(
    target: Path,
    save: Callable[[Path], None],
    config: Config,
    state: dict[str, Any],
    bound: Bound | None,
    rescue: str,
) -> None:
    """Write an export beside its place and swap it in, so that no reader sees half of one.

    Args:
        target: the folder.
        save: writes the model and its tokenizer into a folder.
        config: the run's config.
        state: the state of the checkpoint that the weights belong to.
        bound: the newest validation bound.
        rescue: how to continue if writing fails, the end of that sentence.

    Raises:
        CheckpointError: it cannot be written; the earlier export is as it was.
    """
    with whole_folder(target, rescue) as folder:
        save(folder)
        (folder / "README.md").write_text(model_card(config, state, bound), encoding="utf-8")
        record = json.dumps(_training_record(config, state), indent=2, ensure_ascii=False)
        (folder / TRAINING_FILE).write_text(record + "\n", encoding="utf-8")


def _training_record(config: Config, state: dict[str, Any]) -> dict[str, Any]:
    """Return which weights the export holds and what they come from, for later evaluations."""
    decay = config.train.ema_decay
    return {
        "weights": "ema" if decay > 0 else "raw",
        "ema_decay": decay,
        **{key: state[key] for key in ("step", "tokens", "parameters")},
        "seed": config.run.seed,
        "code": code_record(),
        "corpus": state["corpus"],
    }


def model_card(config: Config, state: dict[str, Any], bound: Bound | None) -> str:
    """Return a model card made from the config, the corpus record and the validation bound."""
    family = config.diffusion
    front = {
        "library_name": "textdiff",
        "pipeline_tag": "text-generation",
        "tags": ["text-diffusion", family.objective.kind, family.process],
    }
    whole = f"{config.data.sequence_length} (the whole sequence)"
    text = files("textdiff.export").joinpath("model_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=Path(config.run.dir).name,
        objective=family.objective.kind,
        process=family.process,
        blocks=" or ".join(str(size or whole) for size in family.block_sizes),
        length=config.data.sequence_length,
        parameters=f"{state['parameters']:,}",
        tokenizer=config.tokenizer.kind,
        vocabulary=f"{state['vocabulary']:,}",
        sources=", ".join(source.source for source in config.data.sources),
        steps=f"{state['step']:,}",
        tokens=f"{state['tokens']:,}",
        seed=config.run.seed,
        result=_result(bound, averaged=config.train.ema_decay > 0),
        oldest=".".join(map(str, NEEDED)),
        record=json.dumps(state["corpus"], indent=2, ensure_ascii=False),
    )


def _result(bound: Bound | None, averaged: bool) -> str:
    """Return the validation bound in a sentence."""
    if bound is None:
        return "No validation bound was computed."
    low, high = bound.perplexity_interval()
    interval = (
        f"of unknown error: {bound.doubt}"
        if bound.doubt
        else f"95 % interval {low:.3f} to {high:.3f} of the Monte-Carlo error"
    )
    sign, bits = ("≤" if bound.is_bound else "≈"), bound.bits_per_byte
    per_byte = "" if bits is None else f" {bits:.4f} bits per byte,"
    note = f" Not a bound: {bound.note}." if bound.note else ""
    return (
        f"Validation perplexity {sign} **{bound.perplexity:.3f}** per token ({interval}),"
        f"{per_byte} on {bound.tokens} tokens in {bound.documents} documents; estimator "
        f"`{bound.estimator}`, {bound.replicates} replicates, "
        f"{'averaged' if averaged else 'last'} weights.{note}"
    )
