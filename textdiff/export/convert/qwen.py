"""Models in the shape of Qwen: Dream, SDAR and those of the dllm library."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

from textdiff.export.convert.stock_network import StockNetwork, published_name


class DreamCheckpoint(StockNetwork):
    """Qwen2 that fills masks, each output about the next token (arXiv:2508.15487)."""

    kind: Literal["dream"] = "dream"

    ids = (
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-v0-Instruct-7B",
        "apple/DiffuCoder-7B-Base",
        "apple/DiffuCoder-7B-Instruct",
        "apple/DiffuCoder-7B-cpGRPO",
    )
    repository = "https://github.com/DreamLM/Dream"
    licence = "apache-2.0"
    model_type = "qwen2"
    published_mask = 151666
    shift = True

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the config says so."""
        return str(config.get("model_type")).lower() == "dream"


class SDARCheckpoint(StockNetwork):
    """Qwen3 in blocks (arXiv:2510.06303), and TraDo."""

    kind: Literal["sdar"] = "sdar"

    ids = (
        *(f"JetLM/SDAR-{size}-Chat" for size in ("1.7B", "4B", "8B")),
        *(f"JetLM/SDAR-{size}-Chat-b{b}" for size in ("1.7B", "4B", "8B") for b in (8, 16, 32, 64)),
        "Gen-Verse/TraDo-4B-Instruct",
        "Gen-Verse/TraDo-8B-Instruct",
    )
    repository = "https://github.com/JetAstra/SDAR"
    licence = "mit"
    model_type = "qwen3"
    published_mask = 151669

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the config says so."""
        return config.get("model_type") == "sdar"

    def blocks(self, config: Mapping[str, Any]) -> int:
        """Return the block size: in the config, at the end of the name (`-b16`), else 4."""
        named = re.search(r"-b(\d+)$", published_name(config))
        return int(config.get("block_size") or (named[1] if named else 4))


class A2DCheckpoint(StockNetwork):
    """Autoregressive models that the dllm library has adapted; `bd3lm` in the name: in blocks."""

    kind: Literal["a2d"] = "a2d"

    ids = (
        "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1",
        "dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-mdlm-v0.1",
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
    )
    repository = "https://github.com/ZHZisZZ/dllm"
    licence = "apache-2.0"
    published_mask = 151669

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the config says so."""
        return str(config.get("model_type")).startswith("a2d-")

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Return that of the model that was adapted."""
        return str(config.get("model_type")).removeprefix("a2d-")

    def blocks(self, config: Mapping[str, Any]) -> int | None:
        """Return the block size: in the config, else 32 where the name says `bd3lm`."""
        size = config.get("block_size") or (32 if "bd3lm" in published_name(config).lower() else 0)
        return int(size) or None
