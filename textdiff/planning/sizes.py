"""Sizes of a run that decide its memory and its time.

The network and its optimizers are built on torch's meta device, where tensors have shapes and no
storage, so parameters are counted exactly.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiff.config import Config
from textdiff.config.networks import stock_source
from textdiff.export.adapters import add_adapters
from textdiff.models import Denoiser
from textdiff.planning.blocks import BlockSizes, block_sizes_of
from textdiff.train.operations import TokenFlops, flops_per_token, masks_per_row, token_uses
from textdiff.train.optim import build_optimizers
from textdiff.train.setup import architecture
from textdiff.train.sharding import tables_apart

FLOAT = 4
HALF = 2


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        total: all of them.
        trained: those with a gradient; without adapters all of them.
        adamw: trained by AdamW.
        muon: trained by Muon.
        head: of the output layer.
        head_trained: of it, with a gradient.
        block: of one Transformer block.
        root: outside the blocks: embedding, head, noise levels.
        tables: of embedding and head where FSDP2 gathers each by itself; else 0 and 0.
        matrices: in all matrices of the blocks, those of the modulation included.
        vectors: in all biases and norms of the blocks.
    """

    total: int
    trained: int
    adamw: int
    muon: int
    head: int
    head_trained: int
    block: int
    root: int
    tables: tuple[int, int]
    matrices: int
    vectors: int


@dataclass(frozen=True)
class RunSizes:
    """Everything about a run that decides its memory and time.

    Attributes:
        config: the run's config.
        counts: numbers of parameters.
        blocks: sizes of the network's blocks.
        flops: operations per data token.
        vocabulary: V, rows of embedding and head.
        streams: copies of the sequence that the blocks read; 2 in block diffusion: clean and noisy.
        draws: masks of every example in a step: 2 where they are complementary, or the schedule is
            learned.
        scored: average fraction of the positions that contribute to the loss; more than 1 where
            clean ones do as well.
        half: whether products are computed in bfloat16.
        chunked: whether the CPU's own kernels run.
        devices: processes that share the work.
        sharded: whether weights and their state are spread over the devices (FSDP2), not copied.
    """

    config: Config
    counts: Counts
    blocks: BlockSizes
    flops: TokenFlops
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

    @property
    def tokens(self) -> int:
        """Positions that the blocks read in a micro-batch."""
        rows = self.config.train.micro_batch_size
        return rows * self.config.data.sequence_length * self.streams * self.draws

    @property
    def noisy_scored(self) -> float:
        """Average fraction of the positions that are predicted from noise."""
        return self.scored - (1.0 if self.config.diffusion.objective.ar_weight else 0.0)

    @property
    def training_tokens(self) -> int:
        """Tokens of the whole run."""
        train = self.config.train
        return train.global_batch_size * self.config.data.sequence_length * train.steps

    @property
    def value(self) -> int:
        """Bytes of a value that a product reads."""
        return HALF if self.half else FLOAT

    def with_rows(self, rows: int) -> "RunSizes":
        """Return the same run with another micro-batch, accumulated as often as it then takes."""
        train = self.config.train.model_copy(update={"micro_batch_size": rows})
        return replace(self, config=self.config.model_copy(update={"train": train}))


def run_sizes(
    config: Config, vocabulary: int, half: bool, chunked: bool = True, devices: int = 1
) -> RunSizes:
    """Return the sizes of a run whose weights are copied to every device.

    Args:
        config: the run's config.
        vocabulary: V, the tokenizer's ids.
        half: products in bfloat16.
        chunked: the device is a CPU.
        devices: processes that share the work.
    """
    configuration = architecture(config, vocabulary, mask_token_id=vocabulary - 1)
    with torch.device("meta"):
        model = config.model.build(configuration)
        if config.train.lora is not None:
            fresh = stock_source(config.train.init_from) is not None
            add_adapters(model, config.train.lora, fresh=fresh)
    uses = token_uses(config)
    return RunSizes(
        config=config,
        counts=_count(model, config),
        flops=flops_per_token(config, model),
        blocks=block_sizes_of(config.model, model, half),  # may leave a network with fake weights
        vocabulary=configuration.vocab_size,
        streams=max(use.streams for use in uses),
        draws=masks_per_row(config, model.exponents is not None),
        scored=sum(use.scored for use in uses) / len(uses),
        half=half,
        chunked=chunked,
        devices=devices,
    )


def _count(model: Denoiser, config: Config) -> Counts:
    """Count the parameters of a network, which may have no storage."""
    optimizers = [
        _size(p for group in optimizer.param_groups for p in group["params"])
        for optimizer in build_optimizers(model, config.train)
    ]
    total, blocks = _size(model.parameters()), _size(model.blocks.parameters())
    tables = [_size(table.parameters()) for table in tables_apart(model, model.output_layer)]
    return Counts(
        total=total,
        trained=_size(p for p in model.parameters() if p.requires_grad),
        adamw=optimizers[0],
        muon=sum(optimizers[1:]),
        head=_size(model.output_layer.parameters()),
        head_trained=_size(p for p in model.output_layer.parameters() if p.requires_grad),
        block=blocks // len(model.blocks),
        root=total - blocks,
        tables=(tables[0], tables[1]) if tables else (0, 0),
        matrices=_size(p for p in model.blocks.parameters() if p.ndim == 2),
        vectors=_size(p for p in model.blocks.parameters() if p.ndim < 2),
    )


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(p.shape) for p in parameters)
