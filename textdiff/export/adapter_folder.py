"""Folders of adapters beside a reference to their base, in the format of peft.

`adapter_config.json` and `adapter_model.safetensors` are peft's, which loads them on the base too.
`config.json`, tokenizer and defaults are those of an export; `base.json` names the base and its
hash. Loading merges, and needs no peft.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from textdiff.config.lora import LoraConfig
from textdiff.config.networks import STOCK_PREFIX, stock_source
from textdiff.errors import CheckpointError, TextDiffError, first_line
from textdiff.export.adapters import (
    core_network,
    peft_config,
    peft_name,
    trained_parameters,
    trained_rows,
)
from textdiff.export.base_weights import language_model
from textdiff.export.loading import (
    WEIGHT_SUFFIXES,
    load_exported_tokenizer,
    locate_export,
    read_json,
)
from textdiff.export.saving import SavedModel, write_companions
from textdiff.models import Denoiser, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.backbone import TransformersDenoiser
from textdiff.pretrained import pretrained_folder
from textdiff.storage import file_hash

BASE_FILE = "base.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = peft_name("")
ROWS = peft_name(".rows").removeprefix(PREFIX)


@dataclass(frozen=True)
class AdapterBase:
    """Reference to the weights that adapters were trained on.

    Attributes:
        source: `train.init_from` of their run, its folder as an absolute path.
        sha256: hash of the files of its weights, in the order of their names.
    """

    source: str
    sha256: str | None

    @classmethod
    def of(cls, init_from: str) -> "AdapterBase":
        """Return the reference to an export, or to a language model of transformers."""
        source = stock_source(init_from)
        folder = _folder(init_from)
        name = init_from if source is None else source
        place = str(folder.resolve()) if Path(name).expanduser().exists() else name
        prefix = "" if source is None else STOCK_PREFIX
        return cls(prefix + place, weights_hash(folder))

    def check(self, folder: Path) -> None:
        """Refuse to load adapters without their base, or on another one.

        Raises:
            CheckpointError: the base is missing, or its weights are others.
        """
        try:
            found_hash = AdapterBase.of(self.source).sha256
        except TextDiffError as error:
            raise CheckpointError(
                f"{folder} holds adapters for {self.source}, which cannot be loaded ({error}); "
                f"restore it, or name its place in {folder / BASE_FILE}",
                code="missing_base",
            ) from None
        if found_hash != self.sha256:
            raise CheckpointError(
                f"{folder} holds adapters for {self.source}, whose weights have changed since "
                f"(SHA-256 {str(found_hash)[:12]}, not {str(self.sha256)[:12]}); restore them",
                code="other_base",
            )


def _folder(init_from: str) -> Path:
    source = stock_source(init_from)
    return locate_export(init_from) if source is None else pretrained_folder(source)


def weights_hash(place: Path) -> str | None:
    """Return the SHA-256 of a file of weights, or of those in a folder; None: there are none."""
    if place.is_file():
        return file_hash(place)
    for suffix in WEIGHT_SUFFIXES:
        if files := sorted(place.glob(f"*{suffix}")):
            return file_hash(*files)
    return None


def has_adapters(folder: Path) -> bool:
    """Return whether a folder holds adapters beside a reference to their base."""
    return (folder / BASE_FILE).is_file()


# --- writing -------------------------------------------------------------------------------------


def write_adapters(saved: SavedModel, folder: Path, lora: LoraConfig, base: AdapterBase) -> None:
    """Write a folder of adapters.

    Args:
        saved: a model with adapters.
        folder: where to.
        lora: their section.
        base: what they were trained on.
    """
    model, network = saved.model, core_network(saved.model)
    network.config.architectures = [type(network).__name__]
    network.config.to_json_file(folder / "config.json")
    write_companions(saved, folder)
    weights = {
        peft_name(name): p.detach().contiguous() for name, p in trained_parameters(network).items()
    }
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if isinstance(model, TransformersDenoiser) and trained_parameters(model).keys() & model.extra():
        model.save_extra(folder)
    (folder / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n")
    facts = _peft_facts(model, lora, stock_source(base.source) or base.source)
    (folder / CONFIG_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def _peft_facts(model: Denoiser, lora: LoraConfig, source: str) -> dict[str, Any]:
    """Return peft's description of adapters as plain data."""
    network = core_network(model)
    names = [name for name, module in network.named_modules() if hasattr(module, "lora_A")]
    facts = {"base_model_name_or_path": source, "inference_mode": True}
    config = peft_config(lora, network, names, **facts)
    if rows := trained_rows(model):
        embedding = network.get_input_embeddings()
        name = next(name for name, module in network.named_modules() if module is embedding)
        config.trainable_token_indices = {name: rows}
    return {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.to_dict().items()
    }


# --- loading -------------------------------------------------------------------------------------


def load_adapted(
    folder: Path, dtype: torch.dtype, load: Callable[[str, torch.dtype], Denoiser]
) -> Denoiser:
    """Return the network of a folder of adapters, merged into its base, on the CPU.

    Args:
        folder: the folder.
        dtype: of the network.
        load: returns the network of an export or a published checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or the base is not what it was.
    """
    reference = read_json(folder / BASE_FILE)
    base = AdapterBase(str(reference.get("source")), reference.get("sha256"))
    base.check(folder)
    wide = torch.promote_types(dtype, torch.float32)
    facts = read_json(folder / CONFIG_FILE)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        stock = stock_source(base.source)
        if stock is None:
            model = _configured(config, load(base.source, wide))
        else:
            model = _backbone(folder, stock, config, wide)
        _merge(core_network(model), weights, facts)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} is missing, damaged or does not fit its base "
            f"({first_line(error)}); export the model again",
            code="damaged_adapters",
        ) from None
    return model.to(dtype).eval()


def _configured(config: PreTrainedConfig, base: Denoiser) -> Denoiser:
    """Return a base's weights under another configuration, of another family or length."""
    own = isinstance(config, TextDiffusionConfig)
    model: Denoiser = TextDiffusionModel(config) if own else TransformersDenoiser(config)
    model.load_state_dict(base.state_dict(), assign=True)
    return model


def _backbone(folder: Path, source: str, config: PreTrainedConfig, dtype: torch.dtype) -> Denoiser:
    """Return the language model that adapters were trained on, with rows for their tokens."""
    tokenizer = load_exported_tokenizer(folder, config)
    indices = read_json(folder / CONFIG_FILE).get("trainable_token_indices") or {}
    added = [index for rows in indices.values() for index in rows]
    known = sorted(set(tokenizer.get_vocab().values()) - set(added))
    network = language_model(source, config, added, known, dtype)
    model = TransformersDenoiser(config, network)
    model.load_extra(folder)
    return model


@torch.no_grad()
def _merge(network: Any, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Add adapters to the weights of a plain network, and put trained rows in their places."""
    scale = facts["lora_alpha"] / facts["r"]
    for name in {name.rpartition(".lora_")[0] for name in weights if ".lora_" in name}:
        layer = network.get_submodule(name.removeprefix(PREFIX))
        first, second = (weights[f"{name}.lora_{side}.weight"].to(layer.weight) for side in "AB")
        delta = scale * (second @ first)  # [m, n]
        layer.weight += delta.t() if isinstance(layer, Conv1D) else delta
    for name, rows in (facts.get("trainable_token_indices") or {}).items():
        table = network.get_submodule(name).weight
        table[torch.tensor(rows)] = weights[f"{PREFIX}{name}{ROWS}"].to(table)
