"""Published checkpoints written as exports, once."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from textdiff.data.tokenizer import vocabulary_size
from textdiff.errors import ConfigError
from textdiff.export.loading import DTYPES, is_export, locate_export
from textdiff.export.published import Published, open_published, published_network
from textdiff.export.records import TRAINING_FILE, code_record, filled_card
from textdiff.models import Denoiser
from textdiff.models.configuration import NEEDED
from textdiff.sampling.settings import SamplingConfig
from textdiff.storage import file_hash, whole_folder


def write_converted(
    source: str, target: Path, tokenizer: str | None = None, family: str | None = None
) -> Published:
    """Write a published checkpoint as an export, whole or not at all.

    Args:
        source: its folder, file or hub id.
        target: folder to write, which does not exist.
        tokenizer: folder or hub id of its tokenizer; None: its own.
        family: name of the family of checkpoints; None: it is recognised.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the export not be written.
        ConfigError: there is something at the target, or the source is an export.
        DataError: the tokenizer that was named cannot be loaded.
    """
    _check_target(target)
    place = locate_export(source)
    if is_export(place):
        message = f"{source} is an export of textdiff; there is nothing to convert"
        raise ConfigError(message, code="is_export")
    published, own = open_published(place, tokenizer, family)
    stored = next(iter(published.converted.weights.values())).dtype
    network = published_network(published, stored if stored in DTYPES.values() else torch.float32)
    with whole_folder(target, f"{source} is as it was") as folder:
        network.save_pretrained(folder)
        own.save_pretrained(folder)
        _write_json(folder / "generation_config.json", SamplingConfig().to_export())
        record = _record(source, published)
        _write_json(folder / TRAINING_FILE, record)
        card = converted_card(target.name, published, network, own, record["converted_from"])
        (folder / "README.md").write_text(card, encoding="utf-8")
    return published


def _check_target(target: Path) -> None:
    if os.path.lexists(target):
        message = f"{target} exists and is not overwritten; name a new folder, or move it away"
        raise ConfigError(message, code="target_exists")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _record(source: str, published: Published) -> dict[str, Any]:
    """Return where the weights are from, and which they are."""
    file = published.checkpoint.file
    return {
        "weights": "ema" if published.checkpoint.averaged else "unknown",
        "converted_from": {
            "source": source,
            "file": file.name,
            "sha256": file_hash(file),
            "family": published.family.kind,
            "repository": published.family.repository,
            "licence": published.family.licence,
        },
        "code": code_record(),
    }


def converted_card(
    name: str,
    published: Published,
    network: Denoiser,
    tokenizer: PreTrainedTokenizerFast,
    origin: dict[str, Any],
) -> str:
    """Return the model card of a converted checkpoint."""
    config, family = network.config, published.family
    diffusion, length = config.diffusion, config.max_position_embeddings
    averaged = "averaged (EMA)" if published.checkpoint.averaged else "as published"
    return filled_card(
        "textdiff.export.convert",
        "converted_card.md",
        objective=diffusion["objective"]["kind"],
        process=diffusion["process"],
        licence=family.licence,
        name=name,
        source=origin["source"],
        file=origin["file"],
        hash=origin["sha256"],
        family=family.kind,
        summary=family.summary().rstrip("."),
        repository=family.repository or "unknown",
        stated_licence=family.licence or "not stated",
        weights=averaged,
        blocks=diffusion["block_size"] or f"{length} (the whole sequence)",
        length=length,
        parameters=f"{sum(p.numel() for p in network.parameters()):,}",
        vocabulary=f"{vocabulary_size(tokenizer):,}",
        oldest=".".join(map(str, NEEDED)),
    )
