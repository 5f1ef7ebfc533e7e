"""Sizes of a run that decide its memory and its time, and the operations of a step.

The network and its optimizers are built on torch's meta device, where tensors have shapes and no
storage, so parameters are counted exactly.

Letters: H hidden size, V vocabulary, L sequence length.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiff.config import Config
from textdiff.config.networks import stock_source
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.export.adapters import add_adapters
from textdiff.models import Denoiser
from textdiff.planning.blocks import BlockSizes, block_sizes_of
from textdiff.train.optim import build_optimizers
from textdiff.train.setup import architecture

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
        products: in the blocks' matrices that multiply every position.
        matrices: in all matrices of the blocks, those of the modulation included.
    """

    total: int
    trained: int
    adamw: int
    muon: int
    head: int
    head_trained: int
    block: int
    root: int
    products: int
    matrices: int


@dataclass(frozen=True)
class RunSizes:
    """Everything about a run that decides its memory and time.

    Attributes:
        config: the run's config.
        counts: numbers of parameters.
        blocks: sizes of the network's blocks.
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
    sizes = [size for size in config.diffusion.block_sizes if size is not None]
    spec = config.diffusion.model_dump(mode="json") | {"block_size": sizes[0] if sizes else None}
    objective = build_family(spec, Vocabulary.of(4, 3)).objective
    masked = 1.0 if objective.scores_all_positions or objective.shifted else None
    rates, counts = config.diffusion.noise.range, _count(model, config)
    low, high = rates if isinstance(rates, tuple) else (0.0, 1.0)
    return RunSizes(
        config=config,
        counts=counts,
        blocks=block_sizes_of(config.model, model, half),
        vocabulary=configuration.vocab_size,
        streams=2 if sizes and not objective.shifted else 1,
        draws=2 if config.diffusion.noise.complementary or model.exponents is not None else 1,
        scored=(masked or (low + high) / 2) + (1.0 if objective.ar_weight else 0.0),
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
    return Counts(
        total=total,
        trained=_size(p for p in model.parameters() if p.requires_grad),
        adamw=optimizers[0],
        muon=sum(optimizers[1:]),
        head=_size(model.output_layer.parameters()),
        head_trained=_size(p for p in model.output_layer.parameters() if p.requires_grad),
        block=blocks // len(model.blocks),
        root=total - blocks,
        products=_size(model.block_matrices()),
        matrices=_size(p for p in model.blocks.parameters() if p.ndim == 2),
    )


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(math.prod(p.shape) for p in parameters)


def training_flops(run: RunSizes) -> float:
    """Return operations per data token: forward, twice that backward, recomputed blocks.

    A product of a position with a matrix of p parameters takes 2 p. Attention takes 4 H per pair
    and layer, the head 2 H V at scored positions. In block diffusion both streams together have
    L + b allowed pairs per position, for blocks of b and N = L / b (Sec. 3.1, arXiv:2503.09573):
    `(L b + b^2 N (N - 1) / 2 + b^2 N (N + 1) / 2) / L`.
    """
    hidden, length = run.blocks.hidden, run.config.data.sequence_length
    pairs: float = length
    if run.streams == 2:
        sizes = [size or length for size in run.config.diffusion.block_sizes]
        pairs = sum(size + length for size in sizes) / len(sizes)
    attention = 4.0 * run.blocks.heads * run.blocks.channels * run.blocks.layers * pairs
    blocks = 2.0 * run.counts.products * run.streams + attention
    head = 2.0 * hidden * run.vocabulary * run.scored
    again = blocks if run.config.model.gradient_checkpointing else 0.0
    return run.draws * (3.0 * (blocks + head) + again + first_pass_flops(run, blocks))


def first_pass_flops(run: RunSizes, blocks: float) -> float:
    """Return operations per data token of self-conditioning, on average.

    A forward pass runs on half of the rows, or on all of them if the blocks are compiled. At the
    scored positions of this half there are the head, expected embeddings, and two H x H products
    that are trained.

    Args:
        run: the run.
        blocks: operations of the blocks, forward.
    """
    config, hidden = run.config, run.blocks.hidden
    if not config.model.conditions_itself:
        return 0.0
    rows = 1.0 if config.train.compile else 0.5
    position = 2.0 * 2.0 * hidden * run.vocabulary + 3.0 * 2.0 * 2.0 * hidden**2
    return rows * blocks + 0.5 * run.noisy_scored * position
