"""The likelihood of single orders: one token revealed after another."""

import torch
from torch import Tensor

from textdiff.likelihood.estimators.subsets import hit_lowest, ranks
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Reading, Scorer, likelihood


def chain(batch: WindowBatch, u: Tensor, scorer: Scorer, read: Reading = likelihood) -> Tensor:
    """[B, L] nats of every token given those revealed before it, n rows per window.

    Blocks are revealed in parallel, each given the ones before it.

    Args:
        batch: the windows.
        u: [B, L] float64 in (0, 1); a block's largest is revealed first.
        scorer: the network.
        read: what is read off its predictions; weights are 1.
    """
    most = int(batch.sizes.max())
    counts = torch.arange(1, most + 1)[:, None]
    count = torch.where(counts <= batch.sizes[:, None], counts, 0).flatten(0, 1)
    rank, x0, real, scorable, spread = (
        x.repeat_interleave(most, 0)
        for x in (ranks(u, batch.blocks, batch.scorable), batch.x0, batch.real, batch.scorable, u)
    )
    one = torch.ones_like(count, dtype=torch.float64)
    noise = hit_lowest(rank, count, one, batch.blocks, scorable, spread)
    following = rank == batch.blocks.spread(count) - 1  # revealed next; masked itself
    nats = scorer.nats(x0, noise, real, read, following)
    return torch.unflatten(nats, 0, (-1, most)).sum(1)
