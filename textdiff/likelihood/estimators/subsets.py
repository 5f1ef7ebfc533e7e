"""Noise that hits given numbers of positions, in a given order of them."""

import torch
from torch import Tensor

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.noise import Noise

NEVER = 2.0
"""What holds the place of a uniform at positions that are never hit."""


def ranks(u: Tensor, blocks: Blocks, scorable: Tensor) -> Tensor:
    """[B, L] int64 rank of each position's uniform among the scorable ones of its block.

    Positions that are not scorable come after all that are.

    Args:
        u: [B, L] uniforms.
        blocks: how L falls into blocks.
        scorable: [B, L] bool.
    """
    split = blocks.split(u.masked_fill(~scorable, NEVER), NEVER)
    return blocks.join(split.argsort(stable=True, dim=-1).argsort(-1))


def hit_lowest(
    rank: Tensor, count: Tensor, weight: Tensor, blocks: Blocks, scorable: Tensor, u: Tensor
) -> Noise:
    """Noise that hits the `count` scorable positions of lowest rank in each block.

    The mask rate that a network sees is the count-th smallest of the block's uniforms: Beta(k, n -
    k + 1), whichever positions the ranks put first.

    Args:
        rank: [B, L] ranks, a permutation of 0..n-1 on the n scorable positions of a block.
        count: [B, blocks] int64 positions to hit, at most n each; 0 hits none.
        weight: [B, blocks] float64 weight of a hit position.
        blocks: how L falls into blocks.
        scorable: [B, L] bool.
        u: [B, L] uniforms that only their values are taken of, not their order.
    """
    ordered = blocks.split(u.masked_fill(~scorable, NEVER), NEVER).sort(-1).values
    level = ordered.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    level = level.masked_fill(count == 0, 0.0)
    # Half-way between whole ranks, scaled into (0, 1): nothing is decided by rounding.
    scale = blocks.size + 1.0
    place = ((rank + 0.5) / scale).masked_fill(~scorable, NEVER)
    threshold = blocks.spread(count.to(torch.float64) / scale)
    return Noise(blocks.spread(1.0 - level), threshold, place, blocks.spread(weight))
