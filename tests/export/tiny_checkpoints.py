"""Small published checkpoints of our own making, in the containers that hubs and codes use."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from textdiff.models import TextDiffusionConfig, TextDiffusionModel

ROWS, LENGTH = 41, 16
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n012345678"
END = "<|endoftext|>"

HUB: dict[str, Any] = {
    "model_type": "mdlm",
    "auto_map": {"AutoConfig": "remote.Config", "AutoModelForMaskedLM": "remote.Model"},
    "n_heads": 2,
    "n_blocks": 1,
    "hidden_dim": 16,
    "cond_dim": 129,
    "model_length": LENGTH,
    "vocab_size": ROWS,
    "time_conditioning": False,
}
SEDD = {
    "graph": {"type": "absorb"},
    "noise": {"type": "loglinear"},
    "model": {"n_heads": 2, "length": LENGTH, "scale_by_sigma": True},
}


def weights(rows: int = ROWS, seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """Random weights under their published names, in the order of parameters."""
    torch.manual_seed(seed)
    settings = {"adaln": True, "conditioning_size": 128} | options
    model = TextDiffusionModel(
        TextDiffusionConfig(
            vocab_size=rows,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            **settings,
        )
    )
    return {name: torch.randn_like(p) * 0.2 for name, p in model.named_parameters()}


def prefixed(state: dict[str, Tensor], prefix: str = "backbone.") -> dict[str, Tensor]:
    """The weights as a module around the network holds them, with a buffer among them."""
    named = {f"{prefix}{name}": value.clone() for name, value in state.items()}
    first, *others = named.items()
    return dict([first, (f"{prefix}rotary_emb.inv_freq", torch.ones(4)), *others])


def hub(folder: Path, state: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """A folder as it is on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(prefixed(weights() if state is None else state), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HUB | settings))
    (folder / "remote.py").write_text("raise SystemExit('remote code was run')\n")
    return folder


def sharded(folder: Path, state: dict[str, Tensor]) -> Path:
    hub(folder)
    (folder / "model.safetensors").unlink()
    named = list(prefixed(state).items())
    shards = {"a.safetensors": dict(named[:5]), "b.safetensors": dict(named[5:])}
    for name, content in shards.items():
        save_file(content, folder / name)
    places = {key: name for name, content in shards.items() for key in content}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def pickled(folder: Path, state: dict[str, Tensor]) -> Path:
    hub(folder)
    (folder / "model.safetensors").unlink()
    torch.save(prefixed(state, ""), folder / "pytorch_model.bin")
    return folder


def lightning(folder: Path, state: dict[str, Tensor], **content: Any) -> Path:
    """A Lightning checkpoint with its config inside; `state` is what evaluation uses."""
    folder.mkdir(parents=True, exist_ok=True)
    shell = {f"backbone._orig_mod.{k}": v for k, v in weights(seed=1).items()}
    torch.save(
        {
            "state_dict": shell
            | {"backbone.rotary_emb.inv_freq": torch.ones(4), "sampling_eps_min": torch.ones(())},
            "ema": {"decay": 0.9, "shadow_params": list(state.values())},
            "hyper_parameters": {"config": HUB},
            **content,
        },
        folder / "last.ckpt",
    )
    return folder / "last.ckpt"


def sedd_run(folder: Path, state: dict[str, Tensor]) -> Path:
    """The folder of a training run of SEDD."""
    for name in (".hydra", "checkpoints-meta"):
        (folder / name).mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(SEDD))
    content = {"model": prefixed(weights(seed=1), ""), "step": 3}
    content["ema"] = {"shadow_params": list(state.values())}
    torch.save(content, folder / "checkpoints-meta" / "checkpoint.pth")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 40 tokens, characters and the end of text, as GPT-2's without a mask."""
    vocab = {letter: index for index, letter in enumerate(LETTERS)} | {END: len(LETTERS)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, bos_token=END, clean_up_tokenization_spaces=False
    )
