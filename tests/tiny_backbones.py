"""Tiny random language models of transformers with small tokenizers, in folders as on the hub."""

from pathlib import Path

import torch
from small_tokenizers import bpe, wordpiece
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
MASKED = ("bert", "modernbert", "eurobert", "roberta", "distilbert")


def write_backbone(folder: Path, kind: str = "llama", rows: int = 0, **options) -> Path:
    """Save a network and its tokenizer: with a mask for masked language models, without for others.

    Args:
        folder: where to.
        kind: the architecture's name in transformers.
        rows: rows of the embedding besides those of the tokenizer.
        **options: of its configuration; `dtype` is that of the saved weights.
    """
    tokenizer = wordpiece() if kind in MASKED else bpe()
    dtype = options.pop("dtype", torch.float32)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "cls", "sep")}
    if kind == "eurobert":  # its own default is of a large vocabulary
        ids["mask"] = tokenizer.mask_token_id
    special = {f"{name}_token_id": index for name, index in ids.items()}
    settings = {**SIZES, "vocab_size": len(tokenizer) + rows, "bos_token_id": None, **special}
    config = AutoConfig.for_model(kind, **{**settings, **options})
    torch.manual_seed(1)
    auto = AutoModelForMaskedLM if kind in MASKED else AutoModelForCausalLM
    auto.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
