"""Networks of transformers as they are: their classes, weights, rows of added ids, and heads."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from .backbone_attention import NAME


def network_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of a configuration: masked language models first.

    Raises:
        ValueError: no language model of transformers has it.
    """
    named = (getattr(config, "architectures", None) or [""])[0]
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if causal and (not masked or named == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]):
        return AutoModelForCausalLM
    if masked:
        return AutoModelForMaskedLM
    raise ValueError(f"transformers has no causal or masked language model {config.model_type!r}")


def stock_class(config: PreTrainedConfig) -> Any:
    """Return the class of a configuration's language model itself, which loads a state dict."""
    return network_class(config)._model_mapping[type(config)]


def build_network(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the network of a configuration with random weights.

    Raises:
        ValueError: it does not take other attention functions.
    """
    try:
        network: PreTrainedModel = network_class(config).from_config(
            copy.deepcopy(config), attn_implementation=NAME
        )
    except KeyError as error:  # a model with a table of attention classes of its own
        raise ValueError(f"{config.model_type} has no other attention than its own") from error
    return network


STORED = {"local_files_only": True, "use_safetensors": True}
"""Options of `load_network` for folders that were written here."""


def load_network(
    loader: Any, source: Any, config: PreTrainedConfig, dtype: torch.dtype, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """Return a network with stored weights, and transformers' account of their names.

    Args:
        loader: a class of transformers, or an Auto class.
        source: folder or hub id of the weights; None: `state_dict` among the options has them.
        config: its configuration.
        dtype: of the network.
        options: others of `from_pretrained`.

    Raises:
        Exception: of whatever kind files, shapes and the hub's client raise.
    """
    options |= {"config": config, "dtype": dtype, "output_loading_info": True}
    with without_bars():
        network, info = loader.from_pretrained(source, **options)
    return network, info


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the progress bars of transformers away while entered."""
    shown, quiet_hub = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # also those of huggingface_hub
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        (disable_progress_bars if quiet_hub else enable_progress_bars)()


def add_rows(
    network: PreTrainedModel,
    configuration: PreTrainedConfig,
    added: Sequence[int],
    known: Sequence[int],
) -> None:
    """Make a language model one of a configuration with more ids, in place.

    Added tokens get the average of the known rows, in the embedding and in the head: random rows of
    another norm would cost hundreds of steps.

    Args:
        network: the language model.
        configuration: of the denoiser, for the same architecture.
        added: ids that get new rows.
        known: ids whose rows are averaged.
    """
    if configuration.vocab_size > network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(configuration.vocab_size, mean_resizing=False)
    average_rows(network, added, known)
    facts = (*_FACTS, *(f"{role}_token_id" for role in ("mask", "pad", "eos")))
    network.config.update({name: getattr(configuration, name, None) for name in facts})
    network.config._attn_implementation = configuration._attn_implementation


_FACTS = ("vocab_size", "diffusion", "excluded_token_ids")


@torch.no_grad()
def average_rows(network: PreTrainedModel, added: Sequence[int], known: Sequence[int]) -> None:
    """Give added ids the average of the known rows, in the embedding and in the head."""
    head = network.get_output_embeddings()
    tables = [network.get_input_embeddings().weight, head.weight, getattr(head, "bias", None)]
    for table in {id(table): table for table in tables if table is not None}.values():
        average = table[torch.tensor(known)].mean(0, dtype=torch.float64)
        table[torch.tensor(added, dtype=torch.int64)] = average.to(table.dtype)


def first_position(network: PreTrainedModel) -> int:
    """Return the id of the first position: some models count from after their padding id."""
    for name, module in network.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return int(padding) + 1
    return 0


class _Given(nn.Module):
    """Stand-in for a base model that returns the hidden states it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> Any:
        return _GivenOutput(last_hidden_state=inputs_embeds)


class _GivenOutput(SimpleNamespace):
    def __getitem__(self, index: int) -> Tensor:
        assert index == 0
        return self.last_hidden_state  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class BackboneHead(nn.Module):
    """Head of a network, with all that its own forward pass does to hidden states.

    It is the network around a stand-in for its base model, and shares its parameters.
    """

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        shell = copy.copy(network)
        shell._modules = {**network._modules, network.base_model_prefix: _Given()}
        self.shell = shell

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map [N, H] or [B, L, H] to raw logits [N, V] or [B, L, V]."""
        wide = x.unsqueeze(0) if x.ndim == 2 else x
        logits: Tensor = self.shell(inputs_embeds=wide).logits
        return logits.squeeze(0) if x.ndim == 2 else logits
