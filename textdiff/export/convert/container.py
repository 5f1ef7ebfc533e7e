"""Files of published checkpoints: safetensors, pickled tensors, Lightning, training checkpoints.

Nothing is unpickled but tensors and plain values (`torch.load(weights_only=True)`), and no code of
a checkpoint is run. Where a file holds averaged weights (EMA), these are used.
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from textdiff.errors import CheckpointError, first_line
from textdiff.export.loading import WEIGHT_SUFFIXES, read_json
from textdiff.pretrained import refuse_gguf
from textdiff.storage import refuse_pointer

PREFIXES = ("backbone.", "_orig_mod.", "module.")
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.|sampling_eps_)")
REFUSED = {
    "cond_map.": "it is conditional on classes, which textdiff has no input for",
    "teacher.": "it holds a teacher beside the model; save the student's state dict alone",
}
NAMED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "last.ckpt",
    "checkpoints-meta/checkpoint.pth",
)


@dataclass(frozen=True)
class CheckpointFiles:
    """Content of a checkpoint's files.

    Attributes:
        file: the file of weights, or the index of several.
        config: values of its config file; empty where it has none.
        weights: by name, without prefixes and buffers.
        averaged: whether they are the averaged weights (EMA) of a training checkpoint.
    """

    file: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    averaged: bool = False


def read_checkpoint(place: Path) -> CheckpointFiles:
    """Read a checkpoint from its folder, or from the file of its weights.

    Raises:
        CheckpointError: it has no weights, they are damaged, or reading them would run code.
    """
    file = find_weights(place)
    refuse_pointer(file, CheckpointError)
    content = _read_index(file) if file.name.endswith(".index.json") else read_tensors(file)
    state, averaged = _state(content, file)
    inside = _plain(content.get("hyper_parameters"))
    config = read_settings(file) or inside.get("config") or inside
    return CheckpointFiles(file, dict(config), state, averaged)


def find_weights(place: Path) -> Path:
    """Return the file of weights in a folder, or `place` if it is a file.

    Raises:
        CheckpointError: there is none, or there are several.
    """
    if place.is_file():
        return place
    for name in NAMED:
        if (place / name).is_file():
            return place / name
    # Safetensors of other names may hold anything: they come last.
    suffixes = [suffix for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors"]
    files = [p for suffix in suffixes for p in sorted(place.glob(f"*{suffix}"))]
    files += [p for s in WEIGHT_SUFFIXES for p in sorted((place / "weights").glob(f"*{s}"))]
    files = files or sorted(place.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        listed = ", ".join(p.name for p in files[:4])
        raise CheckpointError(
            f"{place} holds several checkpoints ({listed}); give one of these files",
            code="several_checkpoints",
        )
    refuse_gguf(place)
    raise CheckpointError(
        f"{place} holds no weights: none of {', '.join(NAMED[:3])} and no .ckpt, .pt or .pth file",
        code="no_weights",
    )


def read_settings(file: Path) -> dict[str, Any]:
    """Return the values of the config beside a file of weights; empty where there is none."""
    for folder in (file.parent, file.parent.parent):
        if (folder / "config.json").is_file():
            return read_json(folder / "config.json")
        if (folder / ".hydra" / "config.yaml").is_file():
            return _read_yaml(folder / ".hydra" / "config.yaml")
    return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is damaged ({first_line(error)})", code="damaged") from None
    return _plain(content)


def _plain(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _read_index(index: Path) -> dict[str, Any]:
    """Read the shards that an index names."""
    shards = sorted(set(_plain(read_json(index).get("weight_map")).values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing or not shards:
        what = f"{missing[0]} is missing" if missing else "it names no file"
        raise CheckpointError(f"{index}: {what}; fetch all of the checkpoint", code="no_weights")
    return {k: v for name in shards for k, v in read_tensors(index.parent / name).items()}


def read_tensors(file: Path) -> dict[str, Any]:
    """Return the content of one file: tensors, and the plain values of training checkpoints.

    Raises:
        CheckpointError: it is damaged, or holds more than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        message = f"{file} is damaged or not a file of weights ({first_line(error)})"
        raise CheckpointError(message, code="damaged") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(_unpickling(file, str(error)), code="needs_unpickling") from None
    if not isinstance(content, dict):
        message = f"{file} holds a {type(content).__name__}, not named weights"
        raise CheckpointError(message, code="damaged")
    return content


def _unpickling(file: Path, reason: str) -> str:
    """Say why a file is not read, and how to convert it safely."""
    match = re.search(r"(?:GLOBAL|global:?)\s+([\w.]+)", reason)
    what = f" ({match[1]})" if match else ""
    return (
        f"{file} holds Python objects beside its tensors{what}, and unpickling them can run code: "
        "it is not read; load it with the repository that wrote it, in a sandbox if you do not "
        "trust it, and save the averaged weights there: safetensors.torch.save_file(state_dict, "
        "'model.safetensors'), with a config.json beside"
    )


def _state(content: Mapping[str, Any], file: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the weights of a file's content by name, averaged ones where there are some."""
    inner = [_plain(content.get(key)) for key in ("state_dict", "model")]
    state = next((one for one in inner if one), content)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and not BUFFERS.search(k)}
    if not tensors:
        raise CheckpointError(f"{file} holds no tensor with a name", code="no_weights")
    average = _plain(content.get("ema")).get("shadow_params")
    if average is not None:
        tensors = _averaged(tensors, average, file)
    named = {_bare(name): value for name, value in tensors.items()}
    for name in named:
        for start, reason in REFUSED.items():
            if name.startswith(start):
                message = f"{file} cannot be used: {reason} ({name})"
                raise CheckpointError(message, code="not_supported")
    return named, average is not None


def _averaged(
    tensors: dict[str, Tensor], average: Sequence[Tensor], file: Path
) -> dict[str, Tensor]:
    """Give averaged weights, a list in the order of parameters, the names of the others."""
    if [tuple(v.shape) for v in tensors.values()] != [tuple(v.shape) for v in average]:
        raise CheckpointError(
            f"{file}: its averaged weights (EMA) are {len(average)} tensors that do not fit its "
            f"{len(tensors)} parameters one by one; save a state dict with the averaged weights in "
            "the repository that wrote it",
            code="unnamed_average",
        )
    return dict(zip(tensors, average, strict=True))


def _bare(name: str) -> str:
    """Return a name without the prefixes of the modules around the network."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name
