"""Checkpoints of other codes as networks and families of ours, without a tokenizer.

`load_denoiser` takes exports of textdiff, published folders and files, and hub ids alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.adapter_folder import has_adapters, load_adapted
from textdiff.export.convert import CheckpointFamily, Converted, find_checkpoint_family
from textdiff.export.convert.container import CheckpointFiles, read_checkpoint
from textdiff.export.convert.published_tokenizer import find_tokenizer, with_special_tokens
from textdiff.export.convert.tokenizer_files import stored_mask
from textdiff.export.loading import (
    family_of,
    find_device,
    find_dtype,
    is_export,
    load_exported_tokenizer,
    load_model,
    locate_export,
    read_json,
)
from textdiff.models import Denoiser, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.stock import network_class
from textdiff.sampling.settings import SamplingConfig

SHOWN = 4  # names of weights that a message lists


@dataclass(frozen=True)
class Published:
    """A published checkpoint that was read.

    Attributes:
        checkpoint: its files' content.
        family: the family that it is of.
        converted: configuration and weights in our terms.
    """

    checkpoint: CheckpointFiles
    family: CheckpointFamily
    converted: Converted


def load_denoiser(
    path: str | Path,
    family: str | None = None,
    device: str | torch.device | None = "cpu",
    dtype: str | torch.dtype = "float32",
) -> tuple[Denoiser, Family]:
    """Return the network and the diffusion family of a model, without a tokenizer.

    Its logits are the raw ones of the code that trained it. Ids that a checkpoint lacks, such as a
    mask, are appended as rows that are never predicted.

    Args:
        path: export, run that has one, published folder or file of weights, or hub id, also with a
            revision: `owner/name@branch`.
        family: name of the family of published checkpoints; None: it is recognised.
        device: torch device; None: the fastest.
        dtype: of the network.

    Raises:
        CheckpointError: a file is missing or damaged, needs unpickling, or is of no known family.
        ConfigError: an unknown device, dtype or family.
    """
    where, kind = find_device(device), find_dtype(dtype)
    place = locate_export(path)
    model: Denoiser
    if is_export(place):
        _refuse_choices(path, None, family)
        model = _export_network(place, kind)
    else:
        model = published_network(read_published(place, family), kind)
    model = model.to(where).eval()
    return model, family_of(model.config, where, model.exponents)


def open_model(
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    family: str | None = None,
) -> tuple[Denoiser, PreTrainedTokenizerFast, Family, SamplingConfig, Path]:
    """Return network, tokenizer, family, sampling defaults and folder of a model.

    Args:
        path: see `load_denoiser`.
        device: where the network is to be.
        dtype: of the network.
        tokenizer: see `open_published`.
        family: see `open_published`.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit the others.
        ConfigError: an unknown family, or a tokenizer for an export, which has its own.
    """
    place = locate_export(path)
    network: Denoiser
    if is_export(place):
        _refuse_choices(path, tokenizer, family)
        network = _export_network(place, dtype)
        own = load_exported_tokenizer(place, network.config)
        defaults = SamplingConfig.from_export(read_json(place / "generation_config.json"))
    else:
        published, own = open_published(place, tokenizer, family)
        network, defaults = published_network(published, dtype), SamplingConfig()
    network = network.to(device).eval()
    described = family_of(network.config, device, network.exponents)
    return network, own, described, defaults, place if place.is_dir() else place.parent


def _export_network(folder: Path, dtype: torch.dtype) -> Denoiser:
    """Return the network of an export, whole or as adapters, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the others.
    """
    if has_adapters(folder):
        return load_adapted(folder, dtype, _base_network)
    return load_model(folder, dtype)


def _base_network(path: str, dtype: torch.dtype) -> Denoiser:
    return open_model(path, torch.device("cpu"), dtype)[0]


def _refuse_choices(path: str | Path, tokenizer: str | None, family: str | None) -> None:
    if tokenizer is not None or family is not None:
        message = f"{path} is an export of textdiff: it has its own tokenizer and family"
        raise ConfigError(message, code="own_tokenizer")


def open_published(
    place: Path, tokenizer: str | None = None, family: str | None = None
) -> tuple[Published, PreTrainedTokenizerFast]:
    """Read a published checkpoint and its tokenizer, which fit each other.

    Args:
        place: its folder, or the file of its weights.
        tokenizer: folder or hub id of its tokenizer; None: that of the folder, else the published.
        family: name of the family of checkpoints; None: it is recognised.

    Raises:
        CheckpointError: it cannot be read, or has no tokenizer that fits.
        ConfigError: an unknown family.
        DataError: the tokenizer that was named cannot be loaded.
    """
    published = read_published(place, family)
    own = find_tokenizer(place, published.converted, tokenizer)
    converted, own = with_special_tokens(published.converted, own)
    return replace(published, converted=converted), own


def read_published(place: Path, family: str | None = None) -> Published:
    """Read a published checkpoint from its folder or file.

    Args:
        place: where it is.
        family: name of the family of checkpoints; None: it is recognised.

    Raises:
        CheckpointError: see `load_denoiser`.
        ConfigError: an unknown family.
    """
    checkpoint = read_checkpoint(place)
    config = _described(checkpoint, place)
    known = find_checkpoint_family(place, config, list(checkpoint.weights), family)
    try:
        converted = known.convert(config, checkpoint.weights)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{place}: {error}", code=error.code) from None
    return Published(checkpoint, known, converted)


def _described(checkpoint: CheckpointFiles, place: Path) -> dict[str, Any]:
    """Return a config with what only its folder says: its name, and the tokenizer's mask."""
    config = checkpoint.config | {"name_or_path": str(place)}
    if config.get("mask_token_id") is None:
        config["mask_token_id"] = stored_mask(checkpoint.file.parent)
    return config


def published_network(published: Published, dtype: torch.dtype) -> Denoiser:
    """Return the network of a published checkpoint, on the CPU.

    Raises:
        CheckpointError: weights are missing, left over or of another shape.
    """
    config = published.converted.config
    weights = {name: value.to(dtype) for name, value in published.converted.weights.items()}
    with torch.device("meta"):
        own = isinstance(config, TextDiffusionConfig)
        model: Denoiser = TextDiffusionModel(config) if own else TransformersDenoiser(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_weights(published, {k.removeprefix("network."): shape for k, shape in shapes.items()})
    if not own:
        return _backbone(config, weights, dtype)
    model.load_state_dict(weights, assign=True)
    return model


def _backbone(
    config: PreTrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> TransformersDenoiser:
    """Return a network of transformers with weights, and what surrounds it here."""
    around = {name: value for name, value in weights.items() if name.startswith("noise_embedding.")}
    inside = {name: value for name, value in weights.items() if name not in around}
    # transformers fills what a state dict lacks, such as tables of rotary angles
    kind = network_class(config)._model_mapping[type(config)]
    network = kind.from_pretrained(None, config=config, state_dict=inside, dtype=dtype)
    denoiser = TransformersDenoiser(config, network).to(dtype)
    denoiser.load_state_dict(around, strict=False)
    return denoiser


def _check_weights(published: Published, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are missing, left over or of another shape than those `wanted`."""
    weights = published.converted.weights
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    problems = {
        "missing": [name for name in wanted if name not in shapes],
        "left over": [name for name in shapes if name not in wanted],
        "of another shape": [
            f"{name} {shapes[name]} instead of {shape}"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
    }
    lists = [f"{what}: {_listed(names)}" for what, names in problems.items() if names]
    if lists:
        raise CheckpointError(
            f"{published.checkpoint.file} does not fit family {published.family.kind} and its "
            f"config ({'; '.join(lists)}); name another family with --from, or fetch it again",
            code="weights_do_not_fit",
        )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
