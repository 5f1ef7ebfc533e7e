"""Real denoisers of a few thousand parameters, in float64 and with every parameter random."""

import torch

from textdiff.config import Config
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.export.loading import family_of
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.setup import model_config, sample_defaults

ROWS = 11
MASK = 4
EXCLUDED = (9, 10)
CLEAN = tuple(i for i in range(ROWS) if i not in (MASK, *EXCLUDED))
CONTEXT = 16


def tiny_model(seed: int = 0, **settings) -> TextDiffusionModel:
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=settings.pop("num_hidden_layers", 2),
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        conditioning_size=8,
        mask_token_id=MASK,
        excluded_token_ids=list(EXCLUDED),
        **settings,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = TextDiffusionModel(config).double().eval()
        for parameter in model.parameters():  # zero branches would hide what they compute
            parameter.add_(0.4 * torch.randn_like(parameter))
        model.output_layer.linear.weight.mul_(0.4)  # predictions with some entropy
    return model


def tiny_family(block_size: int | None = None, kind: str = "loglinear", **objective) -> Family:
    spec = {
        "process": "absorbing",
        "schedule": {"kind": kind},
        "objective": {"kind": "mdlm", **objective},
        "block_size": block_size,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


def tiny_pipeline(kind: str, length: int, texts: list[str]) -> TextDiffusion:
    """A model of texts with a tokenizer trained on them, every parameter random."""
    raw = {
        "data": {"sequence_length": length},
        "tokenizer": {"kind": kind},
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }
    config = Config.model_validate(raw)
    tokenizer = config.tokenizer.prepare(texts)
    torch.manual_seed(0)
    model = TextDiffusionModel(model_config(config, tokenizer)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    family = family_of(model.config, torch.device("cpu"))
    return TextDiffusion(model, tokenizer, family, sample_defaults(config))
