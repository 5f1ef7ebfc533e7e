"""From a config to a network and its family; what may change between a run and its resumption."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from pydantic import ValidationError
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from textdiff.config import Config
from textdiff.config.networks import stock_source
from textdiff.config.reading import to_yaml
from textdiff.data.answer_layout import fill_unit
from textdiff.data.corpus import Corpus
from textdiff.data.tokenizer import excluded_ids, vocabulary_size
from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.adapters import add_adapters
from textdiff.export.loading import family_of
from textdiff.export.records import code_record
from textdiff.models import Denoiser
from textdiff.sampling.rules import check_rule
from textdiff.sampling.settings import SamplingConfig
from textdiff.train.attention_backend import attention_backend
from textdiff.train.initial_weights import initial_network, new_rows

# Sections that define what is trained, and their keys that do not: a resumed run may differ only in
# those, in `evaluate`, in `sample` and in `run.dir`.
FIXED = ("data", "tokenizer", "model", "diffusion", "train")
MAY_CHANGE = {
    "data": {"num_proc", "num_workers", "cache_dir", "on_bad_rows"},
    "model": {"attn_implementation", "gradient_checkpointing"},
    "train": {
        "steps",
        "micro_batch_size",
        "lr_schedule",
        "decay_fraction",
        "mixed_precision",
        "compile",
        "sync_each_batch",
        "deterministic",
        "log_every",
        "log_with",
        "profile",
        "checkpoint_every",
        "keep_checkpoints",
        "init_from",
    },
}

SHOWN = 3  # differences between corpora that a sentence names


def model_config(config: Config, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Return the denoiser's configuration for a config and a tokenizer."""
    excluded = set(excluded_ids(tokenizer)) - {tokenizer.mask_token_id}
    return architecture(
        config,
        vocabulary_size(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        excluded_token_ids=sorted(excluded),
    )


def architecture(config: Config, vocabulary: int, **special_ids: Any) -> PreTrainedConfig:
    """Return the denoiser's configuration for a vocabulary of a known size.

    Args:
        config: the run's config.
        vocabulary: rows of embedding and head.
        **special_ids: the tokenizer's special ids, by their names in the configuration.
    """
    names = {"process", "schedule", "block_size", "timesteps", "time_input"}
    diffusion = {
        **config.diffusion.model_dump(mode="json", include=names),
        "objective": config.diffusion.objective.to_export(),
        "prompt_dropout": config.diffusion.noise.prompt_dropout,
    }
    if config.data.conversations is not None:
        diffusion["answer_unit"] = fill_unit(config.diffusion.block_sizes)
    length = config.data.sequence_length
    return config.model.configuration(vocabulary, length, diffusion, **special_ids)


def build_model(
    config: Config, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> tuple[Denoiser, Family]:
    """Return the network on its device and its family; weights from `train.init_from` where set.

    Raises:
        ConfigError: the attention backend cannot train here, the weights do not fit, or the rule
            that samples are to be drawn by does not.
    """
    backend = attention_backend(config, device).backend
    section = config.model.model_copy(update={"attn_implementation": backend})
    config = config.model_copy(update={"model": section})
    model = _starting_network(config, tokenizer, device)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(device)
    family = family_of(model.config, device, model.exponents)
    check_rule(config.sample.rule, family)  # now, and not when the first samples are due
    return model, family


def _starting_network(
    config: Config, tokenizer: PreTrainedTokenizerFast, device: torch.device
) -> Denoiser:
    """Return the network that training starts from, with adapters where these are trained.

    Raises:
        ConfigError: weights or adapters do not fit, or base weights need a GPU.
    """
    lora, start = config.train.lora, config.train.init_from
    if lora is not None and lora.base_bits and device.type != "cuda":
        raise ConfigError(
            f"train.lora.base_bits: {lora.base_bits} needs a GPU that bitsandbytes computes on, "
            f"and this run is on {device.type}; set base_bits: null",
            code="needs_gpu",
        )
    model = initial_network(config, model_config(config, tokenizer), tokenizer)
    if lora is not None:
        add_adapters(model, lora, new_rows(config, tokenizer), stock_source(start) is not None)
    return model


def sample_defaults(config: Config) -> SamplingConfig:
    """Return the config's `sample` section as generation defaults."""
    return SamplingConfig(**config.sample.model_dump(exclude={"num_samples"}))


def check_resume(
    config: Config, corpus: dict[str, Any], state: dict[str, Any], directory: Path
) -> None:
    """Compare a checkpoint's config and corpus with the current ones.

    Args:
        config: the current config.
        corpus: the record of the current corpus.
        state: what the checkpoint holds.
        directory: the run's.

    Raises:
        CheckpointError: naming everything that must not change and did.
    """
    before = _validated(state["config"], directory)
    if changed := _config_changes(before, config.model_dump(mode="json")):
        raise CheckpointError(
            f"{directory} holds a run with {'; '.join(changed)}; restore it, choose another "
            "run.dir, or start over with --resume never"
        )
    if changed := _record_changes(state["corpus"], corpus):
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise CheckpointError(
            f"the corpus is not what the run in {directory} was trained on: "
            f"{'; '.join(changed[:SHOWN])}{more}; "
            "restore the texts, choose another run.dir, or start over with --resume never"
        )


def _validated(before: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return an earlier config with the keys that have been added since, at their defaults."""
    try:
        return Config.model_validate(before).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"the run in {directory} has a config that this textdiff cannot read "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}); continue it with the version "
            "that wrote it, or start over with --resume never",
            code="unknown_config",
        ) from None


def _config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the keys that must not change and did, with the old value and the new one."""
    keys = [("run", "seed")] + [
        (section, key)
        for section in FIXED
        for key in sorted(set(now[section]) - MAY_CHANGE.get(section, set()))
    ]
    return [
        f"{section}.{key} = {old!r} where the config says {new!r}"
        for section, key in keys
        if (old := before[section].get(key)) != (new := now[section][key])
    ]


def _record_changes(before: Any, now: Any, path: str = "") -> list[str]:
    """List where two records differ, among the entries that both have."""
    if isinstance(before, dict) and isinstance(now, dict):
        both = [key for key in before if key in now]
        return [c for key in both for c in _record_changes(before[key], now[key], f"{path}.{key}")]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [c for i, pair in pairs for c in _record_changes(*pair, f"{path}.{i}")]
    return [] if before == now else [f"{path.removeprefix('.')} was {before!r}, is {now!r}"]


def write_facts(
    config: Config, accelerator: Accelerator, corpus: Corpus, texts: Sequence[str], flops: float
) -> None:
    """Write the config of a run, what it depends on besides, and the texts of its validation.

    Args:
        config: the run's.
        accelerator: its processes.
        corpus: its corpus.
        texts: of its validation.
        flops: operations of the model per token.
    """
    directory = Path(config.run.dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    facts = {
        **code_record(),
        "accelerate": accelerate.__version__,
        "platform": platform.platform(),
        "device": str(accelerator.device),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "flops_per_token": flops,
        "corpus": corpus.record,
        "sharded": accelerator.distributed_type == DistributedType.FSDP,
    }
    (directory / "env.json").write_text(json.dumps(facts, indent=2) + "\n")
    with (directory / "validation.jsonl").open("w", encoding="utf-8") as file:
        conversations = config.data.conversations is not None  # whose rows are JSON already
        rows = texts if conversations else [json.dumps({"text": text}) for text in texts]
        file.writelines(f"{row}\n" for row in rows)
