"""The likelihood of single orders: one token revealed after another."""

import torch
from torch import Tensor

from textdiff.likelihood.estimators.subsets import hit_lowest, ranks
from textdiff.likelihood.estimators.view import View
from textdiff.likelihood.scorer import Reading, Scorer, likelihood


def chain(view: View, u: Tensor, scorer: Scorer, read: Reading = likelihood) -> Tensor:
    """[B, L] nats of every token given those revealed before it, n rows per window.

    Blocks are revealed in parallel, each given the ones before it.

    Args:
        view: the windows.
        u: [B, L] float64 in (0, 1); a block's largest is revealed first.
        scorer: the network.
        read: what is read off its predictions; weights are 1.
    """
    most = int(view.sizes.max())
    counts = torch.arange(1, most + 1)[:, None]
    count = torch.where(counts <= view.sizes[:, None], counts, 0).flatten(0, 1)
    rank, x0, real, scorable, spread = (
        x.repeat_interleave(most, 0)
        for x in (ranks(u, view.blocks, view.scorable), view.x0, view.real, view.scorable, u)
    )
    one = torch.ones_like(count, dtype=torch.float64)
    noise = hit_lowest(rank, count, one, view.blocks, scorable, spread)
    following = rank == view.blocks.spread(count) - 1  # revealed next; masked itself
    nats = scorer.nats(x0, noise, real, read, following)
    return torch.unflatten(nats, 0, (-1, most)).sum(1)
