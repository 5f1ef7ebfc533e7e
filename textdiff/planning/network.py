"""What of a config decides memory and time: exact counts of parameters, and a few sizes.

The network and its optimizers are really built, on torch's meta device, where tensors have shapes
and no storage: counts are those of training because it is the same code.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.config import Config
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import TextDiffusionModel
from textdiff.train.optim import build_optimizers
from textdiff.train.setup import architecture


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        total: all of them.
        adamw: those that AdamW trains.
        muon: those that Muon trains.
        head: the output layer's.
        block: one Transformer block's.
        root: those outside the blocks: embedding, head, noise levels.
        products: those of the blocks' matrices, which every position is multiplied by.
        matrices: those and what modulates by the noise level.
    """

    total: int
    adamw: int
    muon: int
    head: int
    block: int
    root: int
    products: int
    matrices: int


@dataclass(frozen=True)
class Plan:
    """A run's sizes.

    Attributes:
        config: the run's config.
        counts: numbers of parameters.
        vocabulary: V, rows of embedding and head.
        streams: copies of the sequence that the blocks read; 2 in block diffusion: clean and noisy.
        draws: masks of every example in a step: 2 where the schedule is learned.
        scored: fraction of the positions that cost nats, on average.
        half: whether products are computed in bfloat16.
        chunked: whether dropout, rotation and attention run in the CPU's own kernels.
        devices: processes that share the work.
        sharded: whether weights and their state are spread over the devices (FSDP2), not copied.
    """

    config: Config
    counts: Counts
    vocabulary: int
    streams: int
    draws: int
    scored: float
    half: bool
    chunked: bool
    devices: int = 1
    sharded: bool = False

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and device."""
        train = self.config.train
        return max(1, train.global_batch_size // (train.micro_batch_size * self.devices))


def plan(
    config: Config,
    vocabulary: int,
    half: bool,
    chunked: bool = True,
    devices: int = 1,
    sharded: bool = False,
) -> Plan:
    """Sizes of a run.

    Args:
        config: the run's config.
        vocabulary: V, the tokenizer's ids.
        half: products in bfloat16.
        chunked: the device is a CPU.
        devices: processes that share the work.
        sharded: FSDP2 instead of copies.
    """
    with torch.device("meta"):
        model = TextDiffusionModel(architecture(config, vocabulary, mask_token_id=vocabulary - 1))
    spec = config.diffusion.model_dump(mode="json")
    blocks = [size for size in config.diffusion.block_sizes if size is not None]
    family = build_family(
        {**spec, "block_size": blocks[0] if blocks else None}, Vocabulary.of(4, 3)
    )
    shifted = family.objective.shifted
    learned = model.exponents is not None
    rates = config.diffusion.noise.range
    low, high = rates if isinstance(rates, tuple) else (0.0, 1.0)
    return Plan(
        config=config,
        counts=count(model, config),
        vocabulary=vocabulary,
        streams=2 if blocks and not shifted else 1,
        draws=2 if learned else 1,
        scored=1.0 if family.objective.scores_all_positions or shifted else (low + high) / 2,
        half=half,
        chunked=chunked,
        devices=devices,
        sharded=sharded,
    )


def count(model: TextDiffusionModel, config: Config) -> Counts:
    """Counts of a network, which may have no storage."""
    optimizers = [
        _size(p for group in optimizer.param_groups for p in group["params"])
        for optimizer in build_optimizers(model, config.train)
    ]
    matrices = {name: p for name, p in model.blocks.named_parameters() if p.ndim == 2}
    products = (p for name, p in matrices.items() if "adaLN" not in name)
    total, blocks = _size(model.parameters()), _size(model.blocks.parameters())
    return Counts(
        total=total,
        adamw=optimizers[0],
        muon=sum(optimizers[1:]),
        head=_size(model.output_layer.parameters()),
        block=blocks // len(model.blocks),
        root=total - blocks,
        products=_size(products),
        matrices=_size(matrices.values()),
    )


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(p.shape) for p in parameters)
