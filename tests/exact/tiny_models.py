"""Real denoisers of a few thousand parameters, in float64 and with every parameter random."""

import torch

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import TextDiffusionConfig, TextDiffusionModel

ROWS = 11
MASK = 4
EXCLUDED = (9, 10)
CLEAN = tuple(i for i in range(ROWS) if i not in (MASK, *EXCLUDED))
CONTEXT = 16


def tiny_model(seed: int = 0, **settings) -> TextDiffusionModel:
    config = TextDiffusionConfig(
        vocab_size=ROWS,
        hidden_size=16,
        num_hidden_layers=2,
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
