"""LLaDA: the shape of Llama under names of its own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from textdiff.errors import CheckpointError
from textdiff.export.convert.stock_network import StockNetwork

# The head and every block's last projection are both called ff_out.
NAMES = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
EXPECTED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "attention_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
}
"""Settings of its config under which it computes what Llama does."""


class LLaDACheckpoint(StockNetwork):
    """Masked diffusion in the shape of Llama (arXiv:2502.09992); not its mixtures of experts."""

    kind: Literal["llada"] = "llada"

    ids = ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5")
    repository = "https://github.com/ML-GSAI/LLaDA"
    licence = "mit"
    model_type = "llama"
    published_mask = 126336

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the weights have its names."""
        return any(name.startswith("model.transformer.blocks.0.ff_proj") for name in names)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return Llama's settings.

        Raises:
            CheckpointError: a setting under which it computes something else.
        """
        for key, expected in EXPECTED.items():
            if config.get(key, expected) not in (expected, None):
                raise CheckpointError(
                    f"its config has {key}: {config[key]!r}, and only {expected!r} is supported",
                    code="wrong_setting",
                )
        width, heads = self.setting(config, "d_model"), self.setting(config, "n_heads")
        single = 1 if config.get("multi_query_attention") else heads
        return {
            "hidden_size": width,
            "intermediate_size": config.get("mlp_hidden_size") or width * config["mlp_ratio"],
            "num_hidden_layers": self.setting(config, "n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": config.get("n_kv_heads") or single,
            "max_position_embeddings": self.setting(config, "max_sequence_length"),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
            "rope_theta": config.get("rope_theta", 10000.0),
            "eos_token_id": config.get("eos_token_id"),
            "pad_token_id": config.get("pad_token_id"),
        }

    def rename(self, name: str) -> str:
        """Return Llama's name of a weight."""
        inner = name.removeprefix("model.transformer.")
        if match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(\w+)", inner):
            layer, module, kind = match.groups()
            return f"model.layers.{layer}.{BLOCK_NAMES.get(module, module)}.{kind}"
        module, _, kind = inner.partition(".")
        return f"{NAMES.get(module, module)}.{kind}"
