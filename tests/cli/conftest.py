"""Tiny exports that nothing has trained: enough for what the command line does with a model."""

from pathlib import Path

import pytest
import torch

from textdiff.config import Config
from textdiff.data.sections import ByteTokenizer, CharTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config, sample_defaults

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .\n"


def build(kind: str, seed: int, block_size: int | None = None) -> TextDiffusion:
    """A float32 model of 24 tokens of context with noise for weights."""
    torch.manual_seed(seed)
    config = Config.model_validate(
        {
            "data": {"sequence_length": 24},
            "tokenizer": {"kind": kind},
            "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
            "diffusion": {"block_size": block_size},
        }
    )
    section = ByteTokenizer() if kind == "byte" else CharTokenizer()
    tokenizer = train_tokenizer(section, [CHARACTERS])
    model = TextDiffusionModel(model_config(config, tokenizer)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    family = family_of(model.config, torch.device("cpu"))
    return TextDiffusion(model, tokenizer, family, sample_defaults(config))


@pytest.fixture(scope="session")
def exports(tmp_path_factory) -> Path:
    """A folder with the exports `a` and `b` (bytes), `c` (characters) and `d` (blocks of 4)."""
    folder = tmp_path_factory.mktemp("exports")
    for name, kind, seed in (("a", "byte", 0), ("b", "byte", 1), ("c", "char", 0)):
        build(kind, seed).save_pretrained(folder / name)
    build("byte", 2, block_size=4).save_pretrained(folder / "d")
    return folder


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    """A folder with a text of 150 characters and five rows with prompts and spans."""
    import json

    folder = tmp_path_factory.mktemp("prose")
    (folder / "text.txt").write_text("the cat sat on the mat. a dog ran over the hill.\n" * 3)
    rows = [
        {"prompt": f"line {i}:", "text": f" words of row {i}.", "spans": [[1, 6], [9, 12]]}
        for i in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    return folder
