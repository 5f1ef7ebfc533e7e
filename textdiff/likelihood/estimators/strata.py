"""Stratified uniforms: where in its range every window, draw and block has its noise level."""

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Index, Stream, uniforms
from textdiff.likelihood.windows import Windows


def strata(
    windows: Windows,
    family: Family,
    seed: int,
    replicate: int,
    draws: int = 1,
    by_document: bool = True,
) -> Tensor:
    """[W, draws, blocks] uniforms, stratified over the windows and blocks of each document.

    The draws of a window live in different parts [s / S, (s + 1) / S) of the unit interval; within
    each part the windows and blocks of a document are dealt out to strata at random. The mean over
    draws is that of one uniform.

    Args:
        windows: what is scored.
        family: says how windows fall into blocks.
        seed: seed of the noise.
        replicate: index of the replicate.
        draws: S.
        by_document: whether strata are those of a document (its numbers then do not depend on the
            others) or of all documents together.
    """
    lengths = torch.tensor([len(tokens) for tokens in windows.tokens])
    size = family.blocks(int(lengths.max())).size
    block = torch.arange(-(-int(lengths.max()) // size))
    draw = torch.arange(draws)[:, None]
    real = (block * size < lengths[:, None, None]).expand(-1, draws, -1)  # [W, S, blocks]

    def entries(x: Tensor) -> Tensor:
        return x.expand(real.shape)[real]

    document = windows.document[:, None, None]
    entry: dict[str, Index] = {
        "row": entries(document),
        "block": entries(windows.index[:, None, None]),
        "step": entries(replicate * draws + draw),
        "position": entries(block),
    }
    group = entries((document if by_document else 0 * document) * draws + draw)
    by_key = uniforms(seed, Stream.STRATA, **entry).argsort()
    order = by_key[group[by_key].argsort(stable=True)]  # by group, then by key
    counts = torch.bincount(group)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    jitter = uniforms(seed, Stream.JITTER, **entry)
    within = (rank - starts[group] + jitter) / counts[group]
    v = ((draw + 0.5) / draws).to(torch.float64).expand(real.shape).clone()
    v[real] = (entries(draw) + within) / draws
    return v
