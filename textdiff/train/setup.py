"""From a config to a network and its family; what may change between a run and its resumption."""

import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerFast

from textdiff.config import Config
from textdiff.data import excluded_ids, vocabulary_size
from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, ConfigError
from textdiff.loading import family_of
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.models.attention import unavailable
from textdiff.pipeline import TextDiffusion
from textdiff.provenance import code_record

# Sections and keys that define what is trained: a resumed run must not differ in them.
FIXED = ("data", "tokenizer", "model", "diffusion", "train")
MAY_CHANGE = {
    "data": {"num_proc", "num_workers", "cache_dir"},
    "model": {"attn_implementation", "gradient_checkpointing"},
    "train": {
        "steps",
        "micro_batch_size",
        "lr_schedule",
        "decay_fraction",
        "mixed_precision",
        "compile",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "init_from",
    },
}


def model_config(config: Config, tokenizer: PreTrainedTokenizerFast) -> TextDiffusionConfig:
    """The denoiser's configuration for a config and a tokenizer."""
    network = config.model
    excluded = set(excluded_ids(tokenizer)) - {tokenizer.mask_token_id}
    built = TextDiffusionConfig(
        vocab_size=vocabulary_size(tokenizer),
        hidden_size=network.hidden_size,
        num_hidden_layers=network.num_layers,
        num_attention_heads=network.num_heads,
        max_position_embeddings=config.data.sequence_length,
        mlp=network.mlp,
        norm=network.norm,
        qk_norm=network.qk_norm,
        dropout=network.dropout,
        adaln=network.adaln,
        time_conditioning=network.time_conditioning,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        excluded_token_ids=sorted(excluded),
        diffusion=config.diffusion.model_dump(
            mode="json", include={"process", "schedule", "objective", "block_size", "timesteps"}
        ),
    )
    # Not a constructor argument: transformers would check the package before we can say why not.
    built._attn_implementation = network.attn_implementation
    return built


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[TextDiffusionModel, Family]:
    """The network on its device and its family; weights from `train.init_from` where set.

    Raises:
        ConfigError: the attention backend cannot train here, or the weights do not fit.
    """
    reason = unavailable(config.model.attn_implementation, device, gradients=True)
    if reason:
        raise ConfigError(f"model.attn_implementation: {reason}")
    model = TextDiffusionModel(model_config(config, tokenizer))
    if config.train.init_from:
        source = TextDiffusion.from_pretrained(config.train.init_from, device="cpu")
        try:
            model.load_state_dict(source.model.state_dict())
        except RuntimeError as error:
            raise ConfigError(
                f"train.init_from {config.train.init_from} does not fit the model section: "
                f"{str(error).splitlines()[-1].strip()}"
            ) from None
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device)
    return model, family_of(model.config, device, model.exponents)


def check_resume(config: Config, before: dict[str, Any], directory: Path) -> None:
    """Compares a checkpoint's config with the current one.

    Raises:
        CheckpointError: naming the first key that must not change.
    """
    now = config.model_dump(mode="json")
    pairs = [(("run", "seed"), before["run"]["seed"], now["run"]["seed"])]
    for section in FIXED:
        keys = (set(before[section]) | set(now[section])) - MAY_CHANGE.get(section, set())
        pairs += [
            ((section, key), before[section].get(key), now[section].get(key))
            for key in sorted(keys)
        ]
    for path, old, new in pairs:
        if old != new:
            raise CheckpointError(
                f"{directory} holds a run with {'.'.join(path)} = {old!r}, the config says "
                f"{new!r}; restore it, choose another run.dir, or start over with --resume never"
            )


def environment(accelerator: Accelerator, corpus: dict[str, Any]) -> dict[str, Any]:
    """What a run depends on besides its config."""
    return {
        **code_record(),
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "corpus": corpus,
    }
