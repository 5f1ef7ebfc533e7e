"""The Transformer that SEDD, MDLM, BD3-LM, UDLM, Duo and GIDD share; sizes are read from weights.

Its parameter names are ours. A config tells heads, length and how the network is used; flags that
contradict the weights (`adaln`, `cond_dim`) are not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from textdiff.errors import CheckpointError
from textdiff.export.convert.checkpoint_family import CheckpointFamily, Converted, lookup
from textdiff.section import Tensor, torch

EMBEDDING = "vocab_embed.embedding"
HEAD = "output_layer.linear"
HEADS = ("n_heads", "model.n_heads", "num_attention_heads")
LENGTHS = ("model_length", "model.length", "max_seq_len")
EPS = 1e-3
"""Tokens left visible at t = 1 by the schedules of SEDD, MDLM, UDLM and Duo."""

TOKENIZERS = {50258: "gpt2", 30522: "bert-base-uncased"}
"""Tokenizer by rows of the embedding."""


class CommonDiT(CheckpointFamily):
    """A family whose network is the common DiT; its `kind` is a method of `method_of`."""

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """See `CheckpointFamily`."""
        return bool(method_of(config, names) == cls.model_fields["kind"].default)

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """See `CheckpointFamily`."""
        from textdiff.models import TextDiffusionConfig

        if EMBEDDING not in weights:
            raise CheckpointError(
                f"the weights have no {EMBEDDING}, which checkpoints of family {self.kind} have; "
                "name another family with --from",
                code="wrong_family",
            )
        rows, hidden = weights[EMBEDDING].shape
        masked = self.has_mask(config)
        condition = weights.get("sigma_map.mlp.0.weight")
        built = TextDiffusionConfig(
            vocab_size=rows + (not masked),
            hidden_size=hidden,
            num_hidden_layers=_blocks(weights),
            num_attention_heads=int(self.setting(config, *HEADS)),
            max_position_embeddings=int(self.setting(config, *LENGTHS)),
            adaln=condition is not None,
            conditioning_size=128 if condition is None else len(condition),
            time_conditioning=condition is not None and self.reads_time(config),
            mask_token_id=rows - 1 if masked else rows,
            diffusion={"block_size": None, "timesteps": None, **self.diffusion(config)},
        )
        if built.hidden_size % built.num_attention_heads:
            raise CheckpointError(
                f"{built.num_attention_heads} heads do not divide the width {hidden} of weights",
                code="shapes_do_not_fit",
            )
        padded = dict(weights) if masked else append_rows(weights, 1)
        return Converted(built, padded, TOKENIZERS.get(rows))

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return process, schedule, objective and, if need be, block size and steps."""
        raise NotImplementedError

    def reads_time(self, config: Mapping[str, Any]) -> bool:
        """Return whether the network was trained with the true noise level, not with zeros."""
        return True

    def has_mask(self, config: Mapping[str, Any]) -> bool:
        """Return whether the last row of the embedding is a mask."""
        return True


METHODS = {
    **dict.fromkeys(("mdlm", "subs", "d3pm"), "mdlm"),
    **dict.fromkeys(("sedd", "score"), "sedd"),
    **dict.fromkeys(("duo", "duo_base"), "duo"),
    **{name: name for name in ("bd3lm", "udlm", "ar")},
}
"""Methods by the names that configs have for them."""


def method_of(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Return the method that a checkpoint of the common DiT was trained by; None: it is another.

    Args:
        config: content of its config file, from the hub or from a training run.
        names: names of its weights, without prefixes and buffers.
    """
    if not (EMBEDDING in names and "blocks.0.attn_qkv.weight" in names):
        return None
    if lookup(config, "p_uniform") is not None:
        return "gidd"
    causal = lookup(config, "causal", "algo.causal_attention")
    if causal or not any(name.startswith("sigma_map.") for name in names):
        return "ar"
    kind = str(config.get("model_type", "")).lower()
    if kind in ("bd3lm", "bamdlm"):  # the container of its baselines, too
        times = "sedd" if config.get("time_conditioning") else "mdlm"
        return "bd3lm" if config.get("cross_attn") else times
    if lookup(config, "graph.type") is not None:
        return "sedd"
    if lookup(config, "diffusion") == "uniform":
        return "udlm"
    stated = lookup(config, "algo.name", "parameterization")
    return METHODS.get(kind) or METHODS.get(str(stated).lower())


def _blocks(weights: Mapping[str, Tensor]) -> int:
    layers = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    return len(layers)


def append_rows(weights: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the weights with `count` ids more, for tokens that are never predicted.

    Their embedding is the mean of the others, their output 0.
    """
    table, head = weights[EMBEDDING], weights[f"{HEAD}.weight"]
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return {
        **weights,
        EMBEDDING: torch.cat([table, mean.expand(count, -1)]),
        f"{HEAD}.weight": torch.cat([head, head.new_zeros(count, head.shape[1])]),
        f"{HEAD}.bias": torch.cat([weights[f"{HEAD}.bias"], head.new_zeros(count)]),
    }
