"""tiny-diffusion: characters, steps of discrete time, the shape of NanoChat in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from textdiff.data.sections import MASK
from textdiff.export.convert.checkpoint_family import Converted
from textdiff.export.convert.stock_network import StockNetwork
from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAMES = {"token_emb": "model.embed_tokens", "output_head": "lm_head"}
BLOCK_NAMES = {
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TIMES = "time_emb.weight"
HEAD_WIDTH, LENGTH = 64, 256
"""Of the published model; its file does not tell them."""


def ascii_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of ASCII codes: 0 is the mask, 127 stands for all other characters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {MASK: 0, **{chr(code): code for code in range(1, 128)}}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=chr(127), fuse_unk=False))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token=MASK,
        unk_token=chr(127),
        clean_up_tokenization_spaces=False,
    )


class TinyDiffusionCheckpoint(StockNetwork):
    """Characters in steps of discrete time, with a learned embedding of each step."""

    kind: Literal["tiny-diffusion"] = "tiny-diffusion"

    repository = "https://github.com/nathan-barry/tiny-diffusion"
    licence = None
    model_type = "nanochat"  # norms without weights, after rotation, of the embedding too
    published_mask = 0

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return whether the weights have its names."""
        return TIMES in names and "blocks.0.attn.c_q.weight" in names

    def own_tokenizer(self) -> Callable[[], PreTrainedTokenizerFast]:
        """Return the maker of the tokenizer of ASCII codes."""
        return ascii_tokenizer

    def convert(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Converted:
        """See `CheckpointFamily`; most settings are read from the weights."""
        steps, width = weights[TIMES].shape
        layers = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
        inner = len(weights["blocks.0.mlp.c_fc.weight"])
        read = {"n_embd": width, "n_layer": len(layers), "inner": inner, "steps": steps}
        return super().convert({**config, **read}, weights)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return NanoChat's settings."""
        heads = config.get("n_head") or max(1, config["n_embd"] // HEAD_WIDTH)
        return {
            "hidden_size": config["n_embd"],
            "intermediate_size": config["inner"],
            "num_hidden_layers": config["n_layer"],
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": config.get("sequence_len") or LENGTH,
            "rms_norm_eps": torch.finfo(torch.float32).eps,
            "final_logit_softcapping": None,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }

    def rename(self, name: str) -> str:
        """Return NanoChat's name of a weight."""
        if name == TIMES:
            return "noise_embedding.weight"
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name):
            return f"model.layers.{match[1]}.{BLOCK_NAMES.get(match[2], match[2])}.weight"
        module, _, kind = name.partition(".")
        return f"{NAMES.get(module, module)}.{kind}"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return masked diffusion in steps, trained on plain cross-entropy."""
        return super().diffusion(config) | {
            "objective": {"kind": "mdlm", "loss_weight": "ce"},
            "timesteps": config["steps"],
            "time_input": "step",
            "noise_embedding": True,
        }
