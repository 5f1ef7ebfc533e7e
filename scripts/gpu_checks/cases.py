"""Objectives, each with a network, its family and one batch."""

import torch
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import Batch, CleanBatch, corrupt
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.train.learned_loss import training_loss

OBJECTIVES: dict[str, dict] = {
    "mdlm": {},
    "sedd": {"objective": {"kind": "sedd"}},
    "d3pm": {"objective": {"kind": "d3pm"}, "timesteps": 20},
    "sedd uniform": {"process": "uniform", "objective": {"kind": "sedd"}},
    "d3pm uniform": {"process": "uniform", "objective": {"kind": "d3pm"}, "timesteps": 20},
    "udlm": {"process": "uniform", "objective": {"kind": "udlm"}},
    "gidd": {
        "process": "hybrid",
        "schedule": {"kind": "hybrid"},
        "objective": {"kind": "gidd"},
    },
    "ar": {"objective": {"kind": "ar"}, "block_size": 1},
    "learned": {"schedule": {"kind": "learned", "exponent": 1.0}},
}
SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "qk_norm": True,
}


class Case:
    """A network, its family and a batch.

    Args:
        name: of the objective.
        block_size: tokens per block; None: those of the objective.
        sizes: of the network.
        rows: of the batch.
        length: of its rows.
    """

    def __init__(self, name: str, block_size: int | None, sizes: dict, rows: int, length: int):
        common = {"process": "absorbing", "schedule": {"kind": "loglinear"}, "timesteps": None}
        objective = {"objective": {"kind": "mdlm"}, "block_size": block_size}
        self.spec = common | objective | OBJECTIVES[name]
        self.spec["block_size"] = OBJECTIVES[name].get("block_size", block_size)
        levels = self.spec["process"] != "absorbing"
        count = sizes["vocab_size"]
        torch.manual_seed(0)
        self.model = TextDiffusionModel(
            TextDiffusionConfig(
                **sizes,
                max_position_embeddings=length,
                mask_token_id=count - 1,
                adaln=levels,
                time_conditioning=levels,
                diffusion=self.spec,
            )
        )
        self.vocabulary = Vocabulary.of(count, count - 1)
        family = self.family(torch.device("cpu"))
        x0 = torch.randint(0, count - 1, (rows, length))
        blocks = family.blocks(length).count
        position, token = torch.rand(2, rows, length, dtype=torch.float64)
        strata = torch.randperm(rows * blocks).view(rows, blocks)  # so that half of all is masked
        drawn = (strata + 0.5).double() / strata.numel()
        self.batch: Batch | CleanBatch
        if family.learned is not None:  # two masks of every row, at the same levels
            pair = NoiseUniforms(drawn.repeat(2, 1), torch.cat([position, token]))
            self.batch = CleanBatch(x0, pair, None, family.block_size)
            return
        uniforms = NoiseUniforms(drawn, position, token if levels else None)
        noise = draw_noise(family, x0, uniforms, training_maker(family, "count"))
        self.batch = corrupt(family, x0, noise, None)

    def family(self, device: torch.device) -> Family:
        """Return the family with its tables on a device."""
        return build_family(self.spec, self.vocabulary, device, self.model.exponents)

    def step(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Return the loss, and all gradients as one vector, on the CPU in float64."""
        model = self.model.to(device, dtype)
        model.zero_grad()
        loss, _ = training_loss(model, self.family(device))(self.batch.to(device))
        loss.backward()
        grads = [p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None]
        return [loss.detach().double().cpu(), torch.cat(grads)]
