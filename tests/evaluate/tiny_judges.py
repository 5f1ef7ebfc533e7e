"""Tiny causal LMs with random weights: a GPT-2 with a beginning-of-text token, a Llama without."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from textdiff.config import Config
from textdiff.data.tokenizer import train_tokenizer
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config

TEXTS = [
    "the cat sat on the mat. a dog ran over the hill.",
    "a",
    "",
    "naïve cafés, and the cat sat again on the mat.",
    "the dog ran over the mat, and a cat sat on the hill. " * 2,
]
CONTEXT = 16


def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>"] if bos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>" if bos else None)


def build_judge(folder: Path, bos: bool) -> None:
    """Saves a network whose predictions depend on what came before, and its tokenizer."""
    torch.manual_seed(0)
    if bos:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=280, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, bos_token_id=0
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=280,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=CONTEXT,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(bos).save_pretrained(folder)


def export(folder: Path, objective: str) -> Path:
    """Saves a textdiff model with noise for weights: bytes, 12 tokens of context."""
    torch.manual_seed(0)
    blocks = {"block_size": 1} if objective == "ar" else {}
    config = Config.model_validate(
        {
            "data": {"sequence_length": 12},
            "tokenizer": {"kind": "byte"},
            "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
            "diffusion": {"objective": {"kind": objective}, **blocks},
        }
    )
    tokenizer = train_tokenizer(config.tokenizer, ["abc"])
    model = TextDiffusionModel(model_config(config, tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    family = family_of(model.config, torch.device("cpu"))
    TextDiffusion(model, tokenizer, family).save_pretrained(folder)
    return folder
