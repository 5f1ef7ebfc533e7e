"""Checkpoints of other codes as networks and families of ours, without a tokenizer.

`load_denoiser` takes exports of textdiff, published folders and files, and hub ids alike.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

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
from textdiff.models import Denoiser, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.stock import add_rows, load_network, stock_class
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
    try:
        converted, own = with_special_tokens(published.converted, own)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}", code=error.code) from None
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
        CheckpointError: weights are missing, left over or of another shape, or the network cannot
            be a denoiser exactly.
    """
    if published.converted.rows is not None:
        return _backbone(published, published.converted.rows, dtype)
    config = published.converted.config
    weights = {name: value.to(dtype) for name, value in published.converted.weights.items()}
    with torch.device("meta"):
        model = TextDiffusionModel(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    _refuse(
        published,
        missing=[name for name in wanted if name not in shapes],
        left_over=[name for name in shapes if name not in wanted],
        of_another_shape=[
            (name, shapes[name], shape)
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
    )
    model.load_state_dict(weights, assign=True)
    return model


def _backbone(published: Published, rows: int, dtype: torch.dtype) -> TransformersDenoiser:
    """Return a network of transformers, and what surrounds it here.

    Args:
        published: its weights, as far as its class has them.
        rows: ids that the weights have.
        dtype: of the network.
    """
    config, weights = published.converted.config, published.converted.weights
    around = {name: value for name, value in weights.items() if name.startswith("noise_embedding.")}
    inside = {name: value for name, value in weights.items() if name not in around}
    loaded = copy.deepcopy(config)
    loaded.vocab_size = rows
    if loaded.pad_token_id is not None and not 0 <= loaded.pad_token_id < rows:
        loaded.pad_token_id = None  # its row is added below
    given = {"state_dict": inside, "ignore_mismatched_sizes": True}
    network, info = load_network(stock_class(loaded), None, loaded, dtype, **given)
    # Files of language models may hold heads of other tasks.
    left_over = () if published.converted.as_it_is else info["unexpected_keys"]
    _refuse(published, info["missing_keys"], left_over, info["mismatched_keys"])
    add_rows(network, config, range(rows, config.vocab_size), range(rows))
    try:
        denoiser = TransformersDenoiser(config, network).to(dtype)
    except ValueError as error:
        message = f"{published.checkpoint.file}: {error}"
        raise CheckpointError(message, code="unsupported_network") from None
    denoiser.load_state_dict(around, strict=False)
    return denoiser


def _refuse(
    published: Published,
    missing: Collection[str],
    left_over: Collection[str],
    of_another_shape: Collection[tuple[str, Sequence[int], Sequence[int]]],
) -> None:
    """Refuse weights that do not fit, if there are any; shapes are the file's and the network's."""
    shapes = [
        f"{name} {tuple(held)} instead of {tuple(wanted)}"
        for name, held, wanted in of_another_shape
    ]
    problems = {"missing": missing, "left over": left_over, "of another shape": shapes}
    lists = [f"{what}: {_listed(sorted(names))}" for what, names in problems.items() if names]
    if lists:
        raise CheckpointError(
            f"{published.checkpoint.file} does not fit family {published.family.kind} and its "
            f"config ({'; '.join(lists)}); name another family with --from, or fetch it again",
            code="weights_do_not_fit",
        )


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
