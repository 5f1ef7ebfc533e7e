"""One evaluation as plain JSON data: the number, and everything that it depends on."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from textdiff.export.provenance import code_record, model_record
from textdiff.likelihood import Estimates
from textdiff.likelihood.endings import stays_masked
from textdiff.likelihood.estimators import build_estimator
from textdiff.likelihood.published import PROTOCOLS
from textdiff.pipeline import TextDiffusion


def evaluation_record(
    model: TextDiffusion,
    estimates: Estimates,
    *,
    seed: int,
    options: Mapping[str, Any],
    protocol: str | None = None,
    stride: int | None = None,
    detokenizer: str = "none",
    processes: int = 1,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """What an evaluation found, and what it takes to find it again.

    Args:
        model: the model that was evaluated.
        estimates: what was found.
        seed: seed of the noise.
        options: `estimator`, if one was named, and its own options as they were given.
        protocol: name of the published protocol, if one was followed.
        stride: tokens between windows; None: windows did not overlap.
        detokenizer: name of what was done to the texts before.
        processes: how many shared the work.
        command: the command line, if there was one.
    """
    asked = dict(options)
    if protocol:
        asked = PROTOCOLS[protocol].settings(options, model.family.block_size)
    chosen = build_estimator(estimates.estimator, **(asked | {"estimator": None}))
    settings = {f.name: getattr(chosen, f.name) for f in fields(chosen) if f.init}
    return {
        **estimates.bound().to_dict(),
        "estimator_settings": settings,
        "seed": seed,
        "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        "context": int(model.model.config.max_position_embeddings),
        "block_size": model.family.block_size,
        "stride": stride,
        "end_of_text": estimates.windows.ends is not None,
        "after_the_end": after_the_end(model, estimates),
        "lossy_documents": [document + 1 for document in estimates.losses()],
        "windows": len(estimates.windows.tokens),
        "text_sha256": estimates.windows.text_digest or None,
        "windows_sha256": estimates.windows.digest,
        "detokenizer": detokenizer,
        "protocol": protocol or "none",
        "biases": list(PROTOCOLS[protocol].biases(estimates.estimator)) if protocol else [],
        "provenance": {
            **model_record(model.folder),
            "code": code_record(),
            "device": _device(model.model.device),
            "processes": processes,
            "command": list(command),
        },
    }


def after_the_end(model: TextDiffusion, estimates: Estimates) -> str:
    """What follows a document in its last block: it is `masked` and unscored, or `nothing`."""
    return "masked" if stays_masked(estimates.windows, model.family) else "nothing"


def _device(device: torch.device) -> str:
    """The device, with its model's name where it has one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
