"""Block models in the shape of Qwen3 as SDAR's published folders, which SGLang serves.

A folder differs from an ordinary one of Qwen3 in its config and in a head that is stored apart
from the embedding. It holds one file of code, the class of its configuration, because transformers
has no model type `sdar`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.sampling.settings import SamplingConfig

ARCHITECTURE = "SDARForCausalLM"
SERVED_MASK = 151669
"""Mask of the published models, which SGLang takes for granted."""

CODE = Path(__file__).with_name("configuration_sdar.py")
SERVER_FILE = "sglang.yaml"

# Settings of Qwen3 that a published config has, besides those written below.
SETTINGS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "mask_token_id",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "vocab_size",
)


def sdar_refusal(model: Denoiser, family: Family) -> str | None:
    """Return why a model cannot be served as SDAR, as a clause; None: it can."""
    config = model.config
    if not isinstance(model, TransformersDenoiser) or config.model_type != "qwen3":
        return f"its network is of type {config.model_type!r}, and SDAR's is qwen3"
    if family.block_size is None:
        return "it generates whole sequences, and SDAR generates block by block"
    objective = family.objective
    if family.process.name != "absorbing" or objective.predicts_score or objective.predicts_mask:
        return f"its objective is {objective.kind}, and SDAR's network predicts masked tokens"
    if objective.shift or objective.shifted:
        return "its outputs are about the next token, and SDAR's about their own"
    if model.time_conditioning:
        return "its network reads the noise level, which no Qwen3 does"
    if config.use_sliding_window:
        return "its attention has a sliding window, which SDAR's has not"
    return None


def write_sdar(
    folder: Path,
    model: Denoiser,
    tokenizer: PreTrainedTokenizerFast,
    family: Family,
    defaults: SamplingConfig,
) -> None:
    """Write a model in SDAR's layout.

    Args:
        folder: where to; it exists.
        model: the network.
        tokenizer: its tokenizer.
        family: with the block size that the config names.
        defaults: sampling defaults; those that servers know are written.

    Raises:
        CheckpointError: SDAR has another network, or generates in another way.
    """
    reason = sdar_refusal(model, family)
    if reason:
        message = f"the model cannot be written in SDAR's layout: {reason}; use --format textdiff"
        raise CheckpointError(message, code="not_sdar")
    assert isinstance(model, TransformersDenoiser)
    weights = {name: value.detach() for name, value in model.network.state_dict().items()}
    weights["lm_head.weight"] = model.network.get_output_embeddings().weight.detach().clone()
    save_torch_state_dict(weights, folder, max_shard_size="5GB")
    shutil.copy(CODE, folder / CODE.name)
    _write_json(folder / "config.json", _config(model, family))
    _write_json(folder / "generation_config.json", _generation(model.config, defaults))
    server = {"block_size": family.block_size} | _threshold(defaults)
    (folder / SERVER_FILE).write_text(yaml.safe_dump(server), encoding="utf-8")
    tokenizer.save_pretrained(folder)


def _config(model: TransformersDenoiser, family: Family) -> dict[str, Any]:
    """Return a published config's keys; with the mask and block size, which they leave out."""
    config = model.config
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "architectures": [ARCHITECTURE],
        "auto_map": {"AutoConfig": f"{CODE.stem}.SDARConfig"},
        "model_type": "sdar",
        **{name: getattr(config, name) for name in SETTINGS},
        "block_size": family.block_size,
        "rope_scaling": rope if scaled else None,
        "rope_theta": theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "use_cache": True,
        "use_sliding_window": False,
    }


def _generation(config: PreTrainedConfig, defaults: SamplingConfig) -> dict[str, Any]:
    """Return the settings of a generation under transformers' names."""
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    warmest = defaults.temperatures[0]
    drawn = {"temperature": warmest, "top_p": defaults.top_p, "top_k": defaults.top_k}
    settings = {"do_sample": warmest > 0.0, **(drawn if warmest else {})}
    return {name: value for name, value in (ids | settings).items() if value is not None}


def _threshold(defaults: SamplingConfig) -> dict[str, float]:
    """Return the confidence at which SGLang's `LowConfidence` accepts tokens, where one is set."""
    value = defaults.knobs.get("threshold") if defaults.rule == "threshold" else None
    return {} if value is None else {"threshold": float(value)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def serving_notes(folder: str, config: PreTrainedConfig) -> list[str]:
    """Return how to serve a written folder, in lines."""
    lines = [
        f"python -m sglang.launch_server --model-path {folder} --trust-remote-code "
        f"--dllm-algorithm LowConfidence --dllm-algorithm-config {folder}/{SERVER_FILE}"
    ]
    if config.mask_token_id != SERVED_MASK:
        lines.append(
            f"its mask is id {config.mask_token_id}, and SGLang takes {SERVED_MASK} for granted: "
            "change mask_id of SDARForCausalLM in its sglang/srt/dllm/config.py"
        )
    return lines
