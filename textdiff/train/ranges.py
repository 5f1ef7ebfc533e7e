"""The search for mask rates of small variance (Sec. 5.2, arXiv:2503.09573).

Rates near 0 and 1 make the loss of a short block noisy: with one token masked its weight is
largest, with all of them the context says least. A range U[low, high] of rates in between trains
steadier gradients, and which range is best depends on the block size.

The measurement is of the training loss itself, in nats per token of a block and with its weight.
It takes blocks of the rows that training reads next, not of validation text, whose bound the choice
would touch. Draws of a range are those draws of the full range whose rate is in
it. So one pass over 4096 blocks or more measures every range, on common random numbers. The weight
is the same for every range: its width is at least 1/2, so no range starts above the rate 1/2, where
the paper drops it. What comes out depends on the weights, the seed and the step alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.family import Blocks, Family
from textdiff.diffusion.noise import Noise, Rates, counts
from textdiff.diffusion.randomness import Stream, bits
from textdiff.loss import PositionTerms, corrupt
from textdiff.models import Denoiser
from textdiff.train.batches import TrainingBatches

_GRID = 20  # ranges start and end at multiples of 1/20
_WIDTHS = (20, 18, 17, 16, 15, 14, 13, 12, 11, 10)
CANDIDATES: tuple[Rates, ...] = tuple(
    (start / _GRID, (start + width) / _GRID)
    for width in _WIDTHS
    for start in range(_GRID - width + 1)
)
"""The full range, then those 0.9 to 0.5 wide in steps of 0.05, wherever they start."""

_BLOCKS, _ROWS = 4096, 64  # measured at least
_CALL_TOKENS = 8192


@dataclass(frozen=True)
class RangeChoice:
    """Mask rates of smallest variance for one block size.

    Attributes:
        range: mask rates of smallest variance.
        variance: of a block's training loss under them, (nats/token)^2.
        unclipped: the same under all rates.
    """

    range: Rates
    variance: float
    unclipped: float


def search_range(
    denoiser: Denoiser,
    family: Family,
    batches: TrainingBatches,
    step: int,
    *,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda losses: losses,
) -> RangeChoice:
    """Find the range of smallest variance; of equal ones the widest, then the lowest.

    Args:
        denoiser: the network, without dropout.
        family: its process, schedule, objective and block size, on the network's device.
        batches: where training rows come from and how their noise is drawn.
        step: the optimizer step that training would take next.
        shard: (rank, processes): this process runs every `processes`-th row.
        reduce: adds losses over processes.
    """
    losses, noise = block_losses(denoiser, family, batches, step, shard)
    losses = reduce(losses)
    blocks = family.blocks(batches.config.data.sequence_length)
    draw, dense = batches.config.diffusion.noise.draw, family.objective.scores_all_positions
    variances = {
        rates: float(losses[inside(noise, blocks, rates, draw, dense)].var())
        for rates in CANDIDATES
    }
    best = min(CANDIDATES, key=lambda rates: variances[rates])  # the first of equal ones
    return RangeChoice(best, variances[best], variances[CANDIDATES[0]])


@torch.no_grad()
def block_losses(
    denoiser: Denoiser,
    family: Family,
    batches: TrainingBatches,
    step: int,
    shard: tuple[int, int] = (0, 1),
) -> tuple[Tensor, Noise]:
    """Return [rows, blocks] nats per token under the full range, and the noise of all rows.

    Rows of other processes are 0.
    """
    settings = batches.config
    blocks = family.blocks(settings.data.sequence_length)
    rows = max(_ROWS, _BLOCKS // blocks.count)
    samples = step * settings.train.global_batch_size + torch.arange(rows)
    seed = int(bits(settings.run.seed, Stream.RANGE, step=step))
    host = family.on_cpu
    uniforms = batches.uniforms(host, samples, batches.levels(0, rows, blocks, seed), seed)
    noise = batches.maker(host)(host, uniforms)
    losses = torch.zeros(rows, blocks.count, dtype=torch.float64)
    own = torch.arange(shard[0], rows, shard[1])
    for chunk in torch.split(own, max(1, _CALL_TOKENS // blocks.length)):
        x0, ids = batches.rows(samples[chunk])
        own_noise = noise.map(lambda value, chunk=chunk: value.expand(rows, blocks.length)[chunk])  # type: ignore[misc]
        batch = corrupt(family.on_cpu, x0, own_noise, ids)
        if denoiser.self_conditioning is not None:
            batch = batch.self_conditioned()
        terms = PositionTerms(denoiser, family, batch.to(denoiser.device)).all().cpu()
        nats = torch.zeros(x0.numel(), dtype=torch.float64).index_add(0, batch.positions, terms)
        losses[chunk] = blocks.split(nats.view_as(x0), 0.0).sum(-1) / blocks.size
    return losses, noise


def inside(noise: Noise, blocks: Blocks, rates: Rates, draw: str, dense: bool) -> Tensor:
    """Return [B, blocks] bool: the blocks of the full range that a narrower one could have drawn.

    Args:
        noise: [B, L], drawn over the full range.
        blocks: how L falls into blocks, all of one size.
        rates: the range.
        draw: `count` or `time`.
        dense: whether counts start at 0.
    """
    shape = noise.u.shape
    if draw == "time":
        rate = blocks.split(1.0 - noise.alpha.expand(shape), 0.0)[..., 0]
        return (rate >= rates[0]) & (rate <= rates[1])
    hits = blocks.split(noise.corrupted.expand(shape), False).sum(-1)
    smallest, largest = counts(torch.full_like(hits, blocks.size), rates, dense)
    return (hits >= smallest) & (hits <= largest)
