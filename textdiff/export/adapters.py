"""Low-rank adapters inside a network: added for training, merged into its weights for exports.

Frozen weights are never written: merged ones stand beside them for as long as an export is made.

Letters: W a weight [m, n], A [r, n] and B [m, r] its adapter.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from textdiff.config.lora import ALL_LINEAR, LoraConfig
from textdiff.errors import ConfigError, closest
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.trained_rows import TrainedRows

ADAPTER = "default"
"""peft's name of a network's only adapter."""


def import_peft() -> Any:
    """Return the library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        message = "train.lora needs the library peft: pip install textdiff[lora]"
        raise ConfigError(message, code="no_peft") from None
    return peft


def core_network(model: Denoiser) -> Any:
    """Return the network that other programs load, whose names adapters have."""
    return model.network if isinstance(model, TransformersDenoiser) else model


def add_adapters(
    model: Denoiser, lora: LoraConfig, rows: Sequence[int] = (), fresh: bool = False
) -> None:
    """Freeze a network and give it adapters, which change nothing until they are trained.

    Args:
        model: the network.
        lora: their sizes and places.
        rows: tokens whose embeddings are trained as well.
        fresh: whether the weights around a network of transformers are new, and trained.

    Raises:
        ConfigError: a target has no layer, or peft is missing.
    """
    peft, network = import_peft(), core_network(model)
    names = target_layers(network, lora.targets)
    peft.inject_adapter_in_model(peft_config(lora, network, names), network, ADAPTER)
    inside = set(map(id, network.parameters()))
    for parameter in model.parameters():
        if id(parameter) not in inside:
            parameter.requires_grad_(fresh)
    if rows:
        network.set_input_embeddings(TrainedRows(network.get_input_embeddings(), rows))
    if isinstance(model, TransformersDenoiser):
        model.attach_head()


def peft_config(lora: LoraConfig, network: Any, names: Sequence[str], **facts: Any) -> Any:
    """Return peft's config of adapters.

    Args:
        lora: their sizes.
        network: the network, with adapters or without.
        names: of its layers that have some.
        **facts: its other keys.
    """
    layers = [network.get_submodule(name) for name in names]
    return import_peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(names),
        fan_in_fan_out=any(isinstance(_layer(layer), Conv1D) for layer in layers),
        **facts,
    )


def target_layers(network: Any, targets: str | Sequence[str]) -> list[str]:
    """Return the qualified names of the linear layers that get adapters.

    Raises:
        ConfigError: a target is not the end of a layer's name, or is a head that is the embedding.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    head = network.get_output_embeddings()
    if targets == ALL_LINEAR:
        return [name for name, layer in layers.items() if layer is not head]
    chosen: set[str] = set()
    for target in targets:
        names = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not names:
            known = sorted({_short(name) for name in layers})
            hint = closest(target, known)
            listed = "" if hint.startswith("there") else f" there are: {', '.join(known)}"
            raise ConfigError(
                f"train.lora.targets: no linear layer is called {target!r}; {hint}{listed}",
                code="unknown_target",
            )
        chosen.update(names)
    table = getattr(network.get_input_embeddings(), "weight", None)
    tied = [name for name in chosen if layers[name].weight is table]
    if tied:
        raise ConfigError(
            f"train.lora.targets: {tied[0]} shares its weight with the embedding, which adapters "
            "of the head would change, too; leave it out",
            code="tied_target",
        )
    return [name for name in layers if name in chosen]


def _short(name: str) -> str:
    """Return the end of a layer's name that tells it from other layers of its block."""
    *_, before, last = ("", *name.split("."))
    return f"{before}.{last}" if last.isdigit() else last


# --- merging -------------------------------------------------------------------------------------


@contextmanager
def merged_adapters(model: Denoiser) -> Iterator[None]:
    """Put merged weights and plain layers in place of adapters while entered."""
    adapted = {n: m for n, m in core_network(model).named_modules() if _has_weights(m)}
    layers = {name: _layer(module) for name, module in adapted.items()}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, module in adapted.items():
            layers[name].weight.data = merged_weight(module)
        _replace(model, layers)
        yield
    finally:
        _replace(model, adapted)
        for name, data in kept.items():
            layers[name].weight.data = data


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """Return W + (alpha / r) B A, or an embedding with its trained rows."""
    if isinstance(module, TrainedRows):
        return module.merged()
    weight: Tensor = _layer(module).weight.detach()
    delta: Tensor = module.get_delta_weight(ADAPTER)
    return weight + delta.to(weight)


def merged_size(model: Denoiser) -> int:
    """Return the number of parameters that a network has without adapters."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not _is_adapter(name))


def _is_adapter(name: str) -> bool:
    return ".lora_" in name or name.endswith(".rows")


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, TrainedRows) or hasattr(module, "lora_A")


def _layer(module: Any) -> Any:
    return getattr(module, "base_layer", module)


def _replace(model: Denoiser, modules: Mapping[str, nn.Module]) -> None:
    """Put modules in their places in the network, which the head may share."""
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(core_network(model).get_submodule(parent), leaf, module)
    if isinstance(model, TransformersDenoiser):
        model.attach_head()


# --- names ---------------------------------------------------------------------------------------


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a run changes, by name: without adapters all of them."""
    named = dict(model.named_parameters())
    if not any(map(_is_adapter, named)):
        return named
    return {name: p for name, p in named.items() if p.requires_grad}


def frozen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a run does not change, by name."""
    changed = trained_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in changed}


def trained_rows(model: Denoiser) -> list[int]:
    """Return the tokens whose embeddings are trained beside adapters."""
    return [index for m in model.modules() if isinstance(m, TrainedRows) for index in m.ids]


def peft_name(name: str) -> str:
    """Return the name of a parameter in files of peft."""
    name = name.replace(f".{ADAPTER}.", ".")
    if name.endswith(".rows"):
        name = f"{name.removesuffix('.rows')}.token_adapter.trainable_tokens_delta"
    return f"base_model.model.{name}"
