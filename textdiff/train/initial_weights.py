"""First weights of a run: random ones, those of an export, or those of a language model.

A language model has rows for its own tokens alone. Tokens that are added get the average row of its
embedding and of its head.
"""

from collections.abc import Iterator

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from textdiff.config import Config
from textdiff.config.networks import TransformersNetwork, stock_source
from textdiff.data.sections import PretrainedTokenizer
from textdiff.data.tokenizer import excluded_ids, load_tokenizer
from textdiff.errors import ConfigError
from textdiff.export.adapters import merged_size, trained_parameters
from textdiff.export.base_weights import language_model
from textdiff.models import Denoiser
from textdiff.models.backbone import EXTRA_FILE, TransformersDenoiser
from textdiff.pipeline import TextDiffusion
from textdiff.pretrained import pretrained_configuration
from textdiff.train.attention_backend import attention_notes


def initial_network(
    config: Config, configuration: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> Denoiser:
    """Return the network with the weights that `train.init_from` names, else with random ones.

    Args:
        config: the run's config.
        configuration: the network's, for that tokenizer.
        tokenizer: the run's.

    Raises:
        ConfigError: the weights do not fit the config or the tokenizer.
        CheckpointError: they are missing or damaged.
    """
    start = config.train.init_from
    source = stock_source(start)
    if source is not None:
        return _adapted(source, config, configuration, tokenizer)
    model = config.model.build(configuration)
    if start is not None:
        export = TextDiffusion.from_pretrained(start, device="cpu")
        reason = _misfit(export, model, tokenizer)
        if reason:
            raise ConfigError(f"train.init_from {start} does not fit {reason}", code="misfit")
        new = model.self_conditioning is not None and export.model.self_conditioning is None
        if new and config.train.lora is not None:
            raise ConfigError(
                f"train.lora keeps the weights of {start}, which has no self-conditioning: its new "
                "layers would stay zero; set model.self_conditioning: false or lora: null",
                code="misfit",
            )
        # What reads earlier predictions may be new: it starts as a no-op.
        model.load_state_dict(model.state_dict() | export.model.state_dict())
    return model


# --- an export -----------------------------------------------------------------------------------

# What a network computes with its weights; the rest of its configuration may differ.
ARCHITECTURE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp",
    "norm",
    "qk_norm",
    "adaln",
    "time_conditioning",
    "conditioning_size",
    "rope_theta",
)


def _misfit(
    source: TextDiffusion, model: Denoiser, tokenizer: PreTrainedTokenizerFast
) -> str | None:
    """Return why weights do not fit another model, as the end of a sentence; None: they fit."""
    for name in ("model_type", *ARCHITECTURE):
        old, new = (getattr(each.config, name, None) for each in (source.model, model))
        if old != new:
            return f"the model section: its {name} is {old}, not {new}"
    old, new = (each.config.diffusion.get("time_input", "sigma") for each in (source.model, model))
    if old != new:
        return f"diffusion.time_input: its network reads {old}, not {new}"
    if source.model.self_conditioning is not None and model.self_conditioning is None:
        return "the model section: its network reads earlier predictions; set self_conditioning"
    if (source.model.exponents is None) != (model.exponents is None):
        return "diffusion.schedule: one of the two is learned, with weights that the other lacks"
    pair = (source.tokenizer, tokenizer)
    old_ids, new_ids = (each.convert_ids_to_tokens(range(len(each))) for each in pair)
    if old_ids != new_ids:
        differ = sum(a != b for a, b in zip(old_ids, new_ids, strict=False))
        return (
            f"the tokenizer: {differ} ids stand for other tokens ({len(old_ids)} ids there, "
            f"{len(new_ids)} here); take its own, tokenizer: {{kind: pretrained, path: "
            f"{source.folder}}}"
        )
    return _other_shapes(source, model)


def _other_shapes(source: TextDiffusion, model: Denoiser) -> str | None:
    """Return which weights have another shape in a model, as the end of a sentence; None: none."""
    old, new = (each.config.vocab_size for each in (source.model, model))
    if old != new and model.config.model_type == "textdiff":
        return (
            f"model.pad_vocab_to_multiple_of: its vocabulary has {old} rows, not {new}; set it to "
            "the value that the weights were trained with (1 where no rows were added)"
        )
    old_shapes, new_shapes = (
        {name: tuple(p.shape) for name, p in each.state_dict().items()}
        for each in (source.model, model)
    )
    if source.model.self_conditioning is None:
        new_shapes = {n: s for n, s in new_shapes.items() if not n.startswith("self_conditioning.")}
    for name in sorted(old_shapes | new_shapes):
        shapes = old_shapes.get(name), new_shapes.get(name)
        if shapes[0] != shapes[1]:
            return f"the model section: {name} has the shape {shapes[0]} there, {shapes[1]} here"
    return None


# --- a language model ----------------------------------------------------------------------------


def _adapted(
    source: str, config: Config, configuration: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast
) -> Denoiser:
    """Return a denoiser with the weights of a language model, and rows for added tokens."""
    section = config.model
    assert isinstance(section, TransformersNetwork)
    own = _own_ids(config, tokenizer)
    rows = pretrained_configuration(source).vocab_size
    _check_rows(source, rows, own, tokenizer)
    known = [index for index in own if index < rows]
    lora = config.train.lora
    network = language_model(
        source,
        configuration,
        added=_added_ids(tokenizer, own),
        known=sorted(known),
        bits=lora.base_bits if lora else None,
    )
    denoiser = section.around(configuration, network)
    assert isinstance(denoiser, TransformersDenoiser)
    _carry_extra(source, denoiser)
    return denoiser


@torch.no_grad()
def _carry_extra(source: str, denoiser: TransformersDenoiser) -> None:
    """Load what an export has around its network: the embedding of the noise level, exponents.

    Raises:
        ConfigError: it does not fit the config.
    """
    if getattr(pretrained_configuration(source), "diffusion", None) is None:
        return  # not an export
    file = cached_file(source, EXTRA_FILE, _raise_exceptions_for_missing_entries=False)
    stored = {} if file is None else load_file(file)
    own = denoiser.extra()
    for name, tensor in stored.items():
        shape = None if name not in own else tuple(own[name].shape)
        if shape != tuple(tensor.shape):
            here = "none" if shape is None else f"the shape {shape}"
            raise ConfigError(
                f"train.init_from: {source} has {name} of the shape {tuple(tensor.shape)}, and the "
                f"model here {here}; set model.noise_embedding, diffusion.time_input and "
                "diffusion.schedule as it was trained, or take the language model that it was "
                "made from",
                code="misfit",
            )
        own[name].copy_(tensor)


def new_rows(config: Config, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the tokens whose embeddings a language model lacks, so that they must be trained.

    Raises:
        ConfigError: one of them is predicted, for which its head would have to be trained as well.
    """
    source = stock_source(config.train.init_from)
    if source is None:
        return []
    rows, own = pretrained_configuration(source).vocab_size, _own_ids(config, tokenizer)
    new = {*_added_ids(tokenizer, own), *(index for index in own if index >= rows)}
    predicted = sorted(new - set(excluded_ids(tokenizer)) - {tokenizer.mask_token_id})
    if predicted:
        raise ConfigError(
            f"train.lora: {tokenizer.convert_ids_to_tokens(predicted[0])!r} is a new token that "
            f"texts hold, whose row in the head of {source} adapters cannot train; train all "
            "weights (lora: null), or take a tokenizer without it",
            code="predicted_rows",
        )
    return sorted(new)


def _added_ids(tokenizer: PreTrainedTokenizerFast, own: set[int]) -> list[int]:
    return sorted(index for index in tokenizer.get_vocab().values() if index not in own)


def _own_ids(config: Config, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids that the tokenizer had before tokens were added to it."""
    assert isinstance(config.tokenizer, PretrainedTokenizer)
    return set(load_tokenizer(config.tokenizer.path).get_vocab().values())


def _check_rows(source: str, rows: int, own: set[int], tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer with tokens that the embedding lacks; mask and padding get new rows."""
    beyond = sorted(
        index for index in own - {tokenizer.mask_token_id, tokenizer.pad_token_id} if index >= rows
    )
    if beyond:
        raise ConfigError(
            f"train.init_from: {len(beyond)} tokens of the tokenizer, such as "
            f"{tokenizer.convert_ids_to_tokens(beyond[0])!r}, have no row in the embedding of "
            f"{source} ({rows} rows); take the tokenizer that belongs to it",
            code="tokenizer_larger",
        )


def starting_notes(
    config: Config, tokenizer: PreTrainedTokenizerFast, model: Denoiser
) -> Iterator[str]:
    """Yield sentences about attention, adapters, and tokens that a tokenizer was given.

    Args:
        config: the run's config.
        tokenizer: the run's.
        model: the network, in one process or whole.
    """
    yield from attention_notes(config, model.device)
    yield from token_notes(config, tokenizer)
    if config.train.lora is not None:
        count = sum(p.numel() for p in trained_parameters(model).values())
        yield (
            f"{config.train.init_from} stays as it is: adapters of rank {config.train.lora.rank} "
            f"train {count:,} parameters beside {merged_size(model):,}"
        )


def token_notes(config: Config, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield sentences about the tokens that a language model's tokenizer was given."""
    source = stock_source(config.train.init_from)
    if source is None:
        return
    own = _own_ids(config, tokenizer)
    reasons = {"mask": "it has no mask token", "pad": "its padding is missing or its end of text"}
    for role, reason in reasons.items():
        index = getattr(tokenizer, f"{role}_token_id")
        if index not in own:
            token = tokenizer.convert_ids_to_tokens(index)
            yield f"{source}: {reason}, so {token} is added as id {index}, of average weights"
