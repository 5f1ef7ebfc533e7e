"""From an export directory (or a hub id) to its parts, each checked as it is loaded."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from textdiff.data.tokenizer import auto_tokenizer, mask_role
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError, ConfigError, first_line
from textdiff.models import Denoiser, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.configuration import initial_exponent
from textdiff.models.stock import STORED, load_network
from textdiff.pretrained import refuse_gguf
from textdiff.storage import refuse_pointers

DEMO = Path(__file__).parent.parent / "demo"
"""The model that comes with the package."""

DTYPES: dict[str, torch.dtype] = {
    n: getattr(torch, n) for n in ("float32", "float64", "bfloat16", "float16")
}

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Names of files that may hold a network's weights end so."""


def find_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a network.

    Raises:
        ConfigError: no network is computed in it.
    """
    dtype = DTYPES.get("float32" if name == "auto" else str(name).removeprefix("torch."))
    if dtype is None:
        message = f"dtype {str(name)!r}: give auto, or one of {', '.join(DTYPES)}"
        raise ConfigError(message, code="unknown_dtype")
    return dtype


def halves_blocks(dtype: str | torch.dtype, device: torch.device) -> bool:
    """Return whether a dtype of `auto` is bfloat16 with a head and norms in float32, on a device.

    Elsewhere, and where a GPU only emulates bfloat16, it is float32.
    """
    if dtype != "auto" or device.type != "cuda":
        return False
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def find_device(name: str | torch.device | None) -> torch.device:
    """Return a device that exists here; None is the fastest.

    Raises:
        ConfigError: the device does not exist here, or holds no numbers.
    """
    try:
        device = torch.device(name or default_device())
        torch.empty(0, device=device)
    except Exception as error:
        raise ConfigError(f"device {name}: {first_line(error)}", code="unknown_device") from None
    if device.type == "meta":
        message = "device meta holds shapes without numbers; choose cpu or cuda"
        raise ConfigError(message, code="unknown_device")
    return device


def family_of(
    config: PreTrainedConfig, device: torch.device, exponents: nn.Module | None = None
) -> Family:
    """Return the diffusion family that a model's configuration names.

    Args:
        config: the model's configuration.
        device: where the model is.
        exponents: the model's own, where its schedule is learned.

    Raises:
        CheckpointError: the configuration does not say.
    """
    if not getattr(config, "diffusion", None) or config.mask_token_id is None:
        raise CheckpointError(
            "config.json has no `diffusion` section or no mask_token_id: it is not a "
            "textdiff export"
        )
    vocabulary = Vocabulary.of(
        config.vocab_size, config.mask_token_id, config.excluded_token_ids or ()
    )
    if initial_exponent(config) is not None and exponents is None:
        raise CheckpointError("the schedule is learned: its family needs the model's exponents")
    try:
        return build_family(config.diffusion, vocabulary, device, exponents)
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"config.json names no valid diffusion family: {error}",
            code=getattr(error, "code", None),
        ) from None


def default_device() -> str:
    """Return the fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_only() -> bool:
    """Return whether jobs of several processes, and training, run on the CPU here.

    They do without an accelerator, and with Apple's MPS: it has no float64, which bounds need.
    Accelerate needs this as an argument, or processes on a CPU do not find each other.
    """
    return not torch.accelerator.is_available() or torch.backends.mps.is_available()


def locate(path: str | Path, patterns: list[str] | None = None, files: bool = False) -> Path:
    """Return the folder of an export, of a run that has one, or of a model fetched from the hub.

    Args:
        path: where it is; a hub id may end in a revision, `owner/name@branch`.
        patterns: names of the files to fetch; None: all.
        files: whether `path` may be a file of weights, which is returned then.

    Raises:
        CheckpointError: there is nothing of that name, or it holds git-lfs pointers.
    """
    folder = Path(path).expanduser()
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if str(path) == DEMO.name and not (folder / "config.json").is_file():
        return DEMO
    if folder.is_dir():
        refuse_pointers(folder, CheckpointError)
        return folder
    if folder.is_file():
        if files and folder.suffix in WEIGHT_SUFFIXES:
            return folder
        raise CheckpointError(f"{path} is a file; give the export directory that holds config.json")
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~", "runs/")):
        raise CheckpointError(
            f"{path}: no such directory; give a run's export directory (runs/NAME/export)",
            code="no_directory",
        )
    try:
        from huggingface_hub import snapshot_download

        name, _, branch = str(path).partition("@")
        return Path(snapshot_download(name, revision=branch or None, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(
            f"{path}: no such directory, and the hub could not be reached for a model of that name "
            f"({type(error).__name__}); check the path or the network"
        ) from None


def locate_export(path: str | Path) -> Path:
    """Return the folder of a model: an export, a run that has one, or a published checkpoint.

    A model of the hub is fetched. A file of weights is returned as it is.

    Raises:
        CheckpointError: it holds something else, which the message names.
    """
    folder = locate(path, files=True)
    if folder.is_file() or (folder / "config.json").is_file():
        return folder
    if (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{path} is a run without an export, which it gets with its first checkpoint; continue "
            f"it with textdiff train {path}/config.yaml"
        )
    if (folder / "trainer.json").is_file() and (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{path} is a training checkpoint, from which textdiff train continues; give the "
            f"run's export: {folder.absolute().parent.parent / 'export'}",
            code="training_checkpoint",
        )
    if any(p.suffix in WEIGHT_SUFFIXES or p.name == ".hydra" for p in folder.iterdir()):
        return folder
    refuse_gguf(folder)
    inside = sorted(folder.glob("*/export/config.json")) + sorted(folder.glob("*/config.json"))
    instead = inside[0].parent if inside else "a run's export directory (runs/NAME/export)"
    raise CheckpointError(f"{path} holds no model: it has no config.json; give {instead}")


def _unusable(reason: str) -> CheckpointError:
    return CheckpointError(f"{reason}; export the model again")


def read_json(path: Path) -> dict[str, Any]:
    """Read one of an export's JSON files.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _unusable(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise _unusable(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise _unusable(f"{path} is damaged (no JSON object)")
    return content


def is_export(place: Path) -> bool:
    """Return whether a folder holds a network that textdiff wrote, of whatever architecture."""
    try:
        config = read_json(place / "config.json")
    except CheckpointError:
        return False
    described = config.get("diffusion")
    return config.get("model_type") == "textdiff" or (
        isinstance(described, dict) and "objective" in described
    )


def load_model(folder: Path, dtype: torch.dtype) -> Denoiser:
    """Return the network of an export, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the configuration.
    """
    content = read_json(folder / "config.json")
    own = content.get("model_type") == "textdiff"
    if not own and "diffusion" not in content:
        raise CheckpointError(
            f"{folder}/config.json is of a {content.get('model_type')!r} model, not a textdiff "
            "export",
            code="not_an_export",
        )
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in weights):
        raise _unusable(f"{folder}/model.safetensors is missing")
    model: Denoiser
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if own:
            model, info = load_network(TextDiffusionModel, folder, config, dtype, **STORED)
        else:
            model, info = TransformersDenoiser.from_pretrained(folder, config, dtype)
    except Exception as error:
        reason = f"a file is damaged or does not fit ({first_line(error)})"
        raise _unusable(f"{folder} cannot be loaded, {reason}") from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(what):
            keys = f"{what.replace('_', ' ')}: {min(map(str, info[what]))}"
            raise _unusable(f"{folder}/model.safetensors does not fit config.json ({keys})")
    return model


def load_exported_tokenizer(folder: Path, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return the tokenizer of an export.

    Raises:
        CheckpointError: it is missing, damaged, or does not fit the network.
    """
    file = folder / "tokenizer.json"
    if not any((folder / name).is_file() for name in (file.name, "tokenizer_config.json")):
        raise _unusable(f"{file} is missing")
    try:
        tokenizer: PreTrainedTokenizerFast = auto_tokenizer(folder, local_files_only=True)
    except Exception as error:
        damaged = f"is damaged ({first_line(error)})"
        what = damaged if file.is_file() else f"cannot be read without {file}"
        raise _unusable(f"the tokenizer in {folder} {what}") from None
    if tokenizer.mask_token_id is None:
        raise _unusable(
            f"the tokenizer in {folder} has no mask token, which the model was trained with "
            "(mask_token in tokenizer_config.json)"
        )
    role = mask_role(tokenizer)
    if role is not None:
        raise CheckpointError(
            f"the tokenizer in {folder} has {tokenizer.mask_token!r} as mask token and as {role}, "
            "which cannot be distinguished; train with a mask token of its own"
        )
    if tokenizer.mask_token_id != config.mask_token_id or len(tokenizer) > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} ({len(tokenizer)} tokens, mask {tokenizer.mask_token_id}) "
            f"does not fit config.json ({config.vocab_size} rows, mask {config.mask_token_id})"
        )
    return tokenizer
