"""A training step to measure: of the small published model on a GPU, of a tiny one on a CPU."""

import torch

from gpu_checks.cases import SMALL, Case
from gpu_checks.device import Moment, moment
from textdiff.config import Config
from textdiff.models.devices import compile_blocks
from textdiff.planning.sizes import RunSizes, run_sizes
from textdiff.train.learned_loss import training_loss
from textdiff.train.optim import build_optimizers
from textdiff.train.run_state import EMA

PHASES = ("forward", "backward", "update")


def network(device: torch.device) -> tuple[dict, int, int]:
    """Return sizes, rows and length."""
    if device.type != "cuda":
        return SMALL | {"vocab_size": 1000}, 4, 64
    sizes = {"vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12}
    return sizes | {"num_attention_heads": 12}, 32, 1024


class Step:
    """A training step: forward with the loss, backward, clipping with optimizer and averages.

    Args:
        device: where it runs; compiled and in bfloat16 on a GPU.
        block: tokens per block; None: one.
        attention: its backend.
    """

    def __init__(self, device: torch.device, block: int | None, attention: str):
        sizes, rows, length = network(device)
        case, on_gpu = Case("mdlm", block, sizes, rows, length), device.type == "cuda"
        self.device, self.on_gpu, self.tokens = device, on_gpu, rows * length
        self.run = planned(device, block, attention)
        self.model = case.model.to(device).train()
        self.model.config._attn_implementation = attention
        if on_gpu:
            compile_blocks(self.model.blocks)
        self.loss = training_loss(self.model, case.family(device))
        self.batch = case.batch.to(device)
        (self.optimizer,) = build_optimizers(self.model, self.run.config.train)
        self.averages = EMA(self.model, 0.999)

    def forward(self) -> None:
        """Compute the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            self.total, _ = self.loss(self.batch)

    def backward(self) -> None:
        """Compute all gradients."""
        (self.total / self.tokens).backward()

    def update(self) -> None:
        """Compute new weights and averages."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update(self.model)

    def __call__(self) -> list[Moment]:
        """Take the step; return the moments before, between and after its phases."""
        moments = [moment(self.device)]
        for phase in (self.forward, self.backward, self.update):
            phase()
            moments.append(moment(self.device))
        return moments


def planned(device: torch.device, block: int | None, attention: str) -> RunSizes:
    """Return the sizes of the step as `textdiff plan` has them."""
    (sizes, rows, length), on_gpu = network(device), device.type == "cuda"
    model = {"hidden_size": sizes["hidden_size"], "num_layers": sizes["num_hidden_layers"]}
    model |= {"num_heads": sizes["num_attention_heads"], "qk_norm": sizes.get("qk_norm", False)}
    train = {"global_batch_size": rows, "micro_batch_size": rows, "compile": on_gpu}
    config = Config.model_validate(
        {
            "data": {"sequence_length": length},
            "model": model | {"attn_implementation": attention},
            "diffusion": {"block_size": block},
            "train": train,
        }
    )
    return run_sizes(config, sizes["vocab_size"], half=on_gpu, chunked=not on_gpu)
