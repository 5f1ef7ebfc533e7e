"""Causal language models as they are: left to right, whose likelihood is exact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from textdiff.errors import CheckpointError
from textdiff.export.convert.stock_network import StockNetwork


class CausalLMCheckpoint(StockNetwork):
    """Causal language model with Llama's names, such as Llama, Qwen, SmolLM or Mistral."""

    kind: Literal["causal-lm"] = "causal-lm"

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether it is one, and nothing says that it fills masks."""
        classes = config.get("architectures") or [""]
        return (
            str(classes[0]).endswith("ForCausalLM")
            and "model.embed_tokens.weight" in names
            and config.get("mask_token_id") is None
            and not config.get("auto_map")
        )

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Return its own."""
        return str(config["model_type"])

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the next token's prediction, from the beginning of text on where there is one."""
        if self.block_size not in (None, 1):
            raise CheckpointError(
                f"block_size {self.block_size}: a causal language model predicts token by token; "
                "adapt it to blocks with train.init_from: hf:PATH",
                code="block_size",
            )
        start = config.get("bos_token_id")
        objective = {"kind": "ar"} | ({} if start is None else {"start": start})
        return super().diffusion(config) | {"objective": objective}

    def blocks(self, config: Mapping[str, Any]) -> int | None:
        """Return blocks of one token."""
        return 1
