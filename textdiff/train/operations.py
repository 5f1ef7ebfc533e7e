"""Operations of a training step per data token, for MFU and for `textdiff plan`.

Products of matrices are counted: 2 operations per weight and position forward. The backward pass
adds 2 for the gradient of the input, and 2 for that of a trained weight. Attention has 4 per pair
and channel forward, and twice that backward. Elementary operations, embeddings of noise levels and
optimizers are left out. Document masks, sliding windows and prompts of conversations take part as
if every position read and predicted all that its layout allows.

Letters: L sequence length, b block size, H hidden size, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from textdiff.config import Config
from textdiff.diffusion.family import Blocks, Family, build_family
from textdiff.diffusion.noise import ALL_RATES, counts
from textdiff.diffusion.process import Vocabulary
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.train.prompts import scored_share

GRID = 1000  # times over which a mask rate is averaged


@dataclass(frozen=True)
class TokenFlops:
    """Operations per data token of a training step.

    Attributes:
        model: what the equations of the step need, which MFU counts.
        computed: with blocks that are recomputed, and what compiled blocks compute needlessly.
    """

    model: float
    computed: float


@dataclass(frozen=True)
class TokenUse:
    """Positions and pairs per data token, in one block size and under one mask.

    Attributes:
        streams: copies of the sequence that blocks read.
        levels: distinct noise levels.
        noisy: average fraction of the positions that are predicted from noise.
        clean: fraction of the clean stream that is predicted as well.
        pairs: pairs of attention in a block.
        noisy_pairs: those of queries of the noisy stream.
    """

    streams: int
    levels: float
    noisy: float
    clean: float
    pairs: float
    noisy_pairs: float

    @property
    def scored(self) -> float:
        """Average number of predictions."""
        return self.noisy + self.clean


def token_uses(config: Config) -> list[TokenUse]:
    """Return the use of a data token in every block size of a run.

    In block diffusion both streams together have L + b allowed pairs per position, of which half
    have noisy queries. For N = L / b blocks they are `(L b + b^2 N (N - 1) / 2 + b^2 N (N + 1) / 2)
    / L` (Sec. 3.1, arXiv:2503.09573). Left to right there are (L + 1) / 2.
    """
    spec = config.diffusion.model_dump(mode="json")
    family = build_family(spec, Vocabulary.of(4, 3))
    length = config.data.sequence_length
    causal = (length + 1) / 2
    uses = []
    for size in config.diffusion.block_sizes:
        blocks = Blocks.of(length, size)
        prompts = config.diffusion.noise.prompts
        noisy = _scored_from_noise(config, family, blocks) * scored_share(blocks, prompts)
        if family.objective.shifted:
            use = TokenUse(1, 1 / length, noisy, 0.0, causal, causal)
        elif size is None:
            use = TokenUse(1, 1 / length, noisy, 0.0, length, length)
        else:
            half, levels = (length + size) / 2, (blocks.count + 1) / length
            clean, seen = (1.0, causal) if family.causal_context else (0.0, half)
            use = TokenUse(2, levels, noisy, clean, half + seen, half)
        uses.append(use)
    return uses


def masks_per_row(config: Config, learned: bool) -> int:
    """Return how many masks every row of a step has.

    Args:
        config: the run's config.
        learned: whether the noise schedule has parameters.
    """
    return 2 if config.diffusion.noise.complementary or learned else 1


def _scored_from_noise(config: Config, family: Family, blocks: Blocks) -> float:
    """Return the average fraction of positions, prompts aside, that are predicted from noise."""
    if family.objective.scores_all_positions or family.objective.shifted:
        return 1.0
    noise, schedule = config.diffusion.noise, family.schedule
    rates = noise.range if isinstance(noise.range, tuple) else ALL_RATES
    if family.timesteps is not None:
        times = torch.arange(1, family.timesteps + 1, dtype=torch.float64) / family.timesteps
    elif noise.complementary:
        return 0.5
    elif noise.draw == "count":
        few, many = counts(torch.tensor(blocks.size), rates, from_zero=False)
        return float(few + many) / (2 * blocks.size)
    else:
        ends = torch.tensor([1.0 - rate for rate in rates], dtype=torch.float64)
        start, end = schedule.t_of_alpha(ends).clamp(0.0, 1.0)
        times = start + (end - start) * (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    return 1.0 - float(schedule.alpha(times).mean())


def flops_per_token(config: Config, model: Denoiser) -> TokenFlops:
    """Return the operations of a training step per data token, averaged over block sizes.

    Args:
        config: the run's config.
        model: its network with adapters, which may have no storage.
    """
    uses, masks = token_uses(config), masks_per_row(config, model.exponents is not None)
    compiled, recomputed = config.train.compile, config.model.gradient_checkpointing
    needed = [_step(config, model, use) for use in uses]
    computed = [_step(config, model, use, compiled, recomputed) for use in uses]
    return TokenFlops(*(masks * sum(values) / len(uses) for values in (needed, computed)))


def _step(
    config: Config, model: Denoiser, use: TokenUse, compiled: bool = False, again: bool = False
) -> float:
    """Return the operations of one pass forward and back, and of what precedes it.

    Args:
        config: the run's config.
        model: its network.
        use: of a data token.
        compiled: whether to count what compiled blocks compute needlessly.
        again: whether to count the blocks a second time.
    """
    blocks, trained = _block_products(model, use, compiled)
    attention = _attention(model, use, compiled)
    head, head_trained = (use.scored * n for n in _weights(model.output_layer.parameters()))
    backward = blocks + trained + 2.0 * attention + head + head_trained
    forward = blocks + attention + head
    repeated = blocks + attention if again else 0.0
    first = _first_pass(model, use, compiled) if config.model.conditions_itself else 0.0
    return forward + backward + repeated + first


def _block_products(model: Denoiser, use: TokenUse, compiled: bool) -> tuple[float, float]:
    """Return operations of all matrices in the blocks forward, and of the trained ones among them.

    Experts multiply only the positions that are routed to them.
    """
    every = trained = 0.0
    last = len(model.blocks) - 1
    for index, block in enumerate(model.blocks):
        for name, weight in block.named_parameters():
            if weight.ndim < 2:
                continue
            positions = _positions(model, name, use, index == last and not compiled)
            if weight.ndim == 3:
                positions *= model.config.num_experts_per_tok / len(weight)
            operations = 2.0 * _size(weight) * positions
            every += operations
            trained += operations * weight.requires_grad
    return every, trained


def _positions(model: Denoiser, name: str, use: TokenUse, last: bool) -> float:
    """Return the positions per data token that a block's matrix multiplies.

    Of our last block only keys and values are needed everywhere. The rest of it is computed where
    something is predicted.
    """
    if "adaLN" in name:
        return use.levels if model.time_conditioning else 0.0
    if not last or isinstance(model, TransformersDenoiser):
        return use.streams
    if "attn_qkv" not in name:
        return use.scored
    return use.streams - 1 / 3 if use.streams == 2 and not use.clean else use.streams


def _attention(model: Denoiser, use: TokenUse, compiled: bool) -> float:
    """Return operations of attention forward."""
    pairs = use.pairs * len(model.blocks)
    if isinstance(model, TransformersDenoiser):
        channels = model.head_dim
    else:
        channels = int(model.config.head_dim)
        if not compiled and not use.clean:
            pairs += use.noisy_pairs - use.pairs
    return 4.0 * int(model.config.num_attention_heads) * channels * pairs


def _first_pass(model: Denoiser, use: TokenUse, compiled: bool) -> float:
    """Return operations of self-conditioning, on average.

    A forward pass runs on half of the rows, or on all of them if the blocks are compiled. At the
    scored positions of this half there are the head, expected embeddings, and two H x H products
    that are trained.
    """
    network: Any = model
    noisy = replace(use, clean=0.0)
    rows = 1.0 if compiled else 0.5
    blocks = _block_products(model, noisy, compiled)[0] + _attention(model, noisy, compiled)
    head, _ = _weights(model.output_layer.parameters())
    added, trained = _weights(network.self_conditioning.parameters())
    expected = 2.0 * _size(network.get_input_embeddings().embedding)
    position: float = head + expected + 2.0 * added + trained
    return rows * blocks + 0.5 * use.noisy * position


def _weights(parameters: Iterable[Tensor]) -> tuple[float, float]:
    """Return operations per position of some matrices, and of the trained ones among them."""
    matrices = [p for p in parameters if p.ndim == 2]
    every = sum(2.0 * _size(p) for p in matrices)
    return every, sum(2.0 * _size(p) for p in matrices if p.requires_grad)


def _size(weight: Tensor) -> int:
    """Return the number of weights; a byte of quantised ones holds two of four bits."""
    return weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
