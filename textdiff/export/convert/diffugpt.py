"""DiffuGPT and DiffuLLaMA: GPT-2 and Llama 2, adapted with each output about the next token."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from textdiff.export.convert.stock_network import HEAD, StockNetwork, published_name

PREFIX = "denoise_model."


class DiffuGPTCheckpoint(StockNetwork):
    """GPT-2 that fills masks, each output about the next token (arXiv:2410.17891)."""

    kind: Literal["diffugpt"] = "diffugpt"

    ids = ("diffusionfamily/diffugpt-s", "diffusionfamily/diffugpt-m")
    repository = "https://github.com/HKUNLP/DiffuLLaMA"
    licence = "apache-2.0"
    model_type = "gpt2"
    published_mask = 10541
    embedding = "transformer.wte.weight"
    shift = True
    tokenizer = "gpt2"

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the weights have its prefix and GPT-2's positions."""
        return any(name.startswith(f"{PREFIX}wpe.") for name in names)

    def rename(self, name: str) -> str:
        """Return GPT-2's name of a weight; the matrix of embedding and head has several."""
        if name == "embed_tokens.weight":
            return self.embedding
        if name.startswith(PREFIX):
            return f"transformer.{name.removeprefix(PREFIX)}"
        return name


class DiffuLLaMACheckpoint(StockNetwork):
    """Llama 2 adapted likewise; nothing but its name tells it from Llama."""

    kind: Literal["diffullama"] = "diffullama"

    ids = ("diffusionfamily/diffullama",)
    repository = "https://github.com/HKUNLP/DiffuLLaMA"
    licence = "apache-2.0"
    model_type = "llama"
    published_mask = 811
    shift = True

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether it is called so."""
        named = published_name(config).lower() == "diffullama"
        return named and config.get("model_type") == "llama" and HEAD in names
