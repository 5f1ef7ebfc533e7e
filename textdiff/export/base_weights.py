"""Weights of a language model for a denoiser: loaded, with rows for tokens that are added."""

import copy
from collections.abc import Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from textdiff.errors import CheckpointError, first_line
from textdiff.models.stock import add_rows, load_network, network_class
from textdiff.pretrained import pretrained_configuration


def language_model(
    source: str,
    configuration: PreTrainedConfig,
    added: Sequence[int],
    known: Sequence[int],
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
) -> PreTrainedModel:
    """Return a language model under a denoiser's configuration, with rows for added tokens.

    Args:
        source: folder or hub id of its weights.
        configuration: the denoiser's.
        added: tokens that the model lacks; their rows become the average of the known ones.
        known: its own tokens.
        dtype: of its weights, whatever its files hold.
        bits: of its linear layers by bitsandbytes; None: they are not quantised.

    Raises:
        CheckpointError: weights are missing, damaged, or of another architecture.
    """
    network = _loaded(source, configuration, dtype, bits)
    add_rows(network, configuration, added, known)
    embedding = network.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = configuration.pad_token_id  # never learned, so not the end of text
    return network


def _loaded(
    source: str, configuration: PreTrainedConfig, dtype: torch.dtype, bits: int | None
) -> PreTrainedModel:
    """Return a language model with as many rows as its files have.

    Raises:
        CheckpointError: see `language_model`.
    """
    stored, loaded = pretrained_configuration(source), copy.deepcopy(configuration)
    loaded.vocab_size, loaded.pad_token_id = stored.vocab_size, stored.pad_token_id
    loaded._attn_implementation = "eager"  # every architecture has it; ours takes its place
    try:
        options = quantization(bits) if bits else {}
        network, info = load_network(network_class(loaded), source, loaded, dtype, **options)
    except UnpicklingError:
        raise CheckpointError(
            f"the weights of {source} hold Python objects beside their tensors, whose unpickling "
            "can run code: they are not read; take a copy in safetensors",
            code="needs_unpickling",
        ) from None
    except Exception as error:  # of whatever kind files, shapes and the hub's client raise
        raise CheckpointError(
            f"the weights of {source} cannot be loaded ({first_line(error)})", code="not_loaded"
        ) from None
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            raise CheckpointError(
                f"{source} does not hold the weights of a {loaded.model_type} language model "
                f"({what.replace('_', ' ')}: {min(map(str, info[what]))})",
                code="missing_weights",
            )
    return network


def quantization(bits: int) -> dict[str, Any]:
    """Return the options that load linear layers in few bits (NF4 of QLoRA) on a GPU."""
    from transformers import BitsAndBytesConfig

    assert bits == 4
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": options, "device_map": {"": torch.cuda.current_device()}}
