"""Counts with the known part of every token's cost taken out: the least variance per row.

Two things make an estimate by counts vary. The cost per token rises with the number of masked
ones, and tokens differ: with few of them masked, their large weight falls on whichever were drawn.
Both are predictable. A pilot masks every token once at three mask rates; between these, its costs
are interpolated to a forecast d_i(k) of what token i costs with k masked. Rows then estimate only
what the forecast misses:

    sum_i mean_k d_i(k)  +  E[ w(k) sum over masked i of (CE_i - d_i(k)) ],  w(k) = 1 / (k p(k)),

which has the same expectation whatever the forecast, because i is masked with probability k / n,
and whatever p(k) > 0. A few more rows of the pilot say how much the forecast misses by k, and p(k)
follows (`allocation`). The pilot's draws are its own and are used for nothing else.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream
from textdiff.likelihood.estimators.allocation import (
    PARTS,
    allocated,
    densities,
    drawn,
    neyman,
    weights,
)
from textdiff.likelihood.estimators.estimator import (
    Estimator,
    Parts,
    require_absorbing,
    require_continuous,
)
from textdiff.likelihood.estimators.subsets import hit_lowest, ranks
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel

ARCS = (16, 2, 1)
"""The pilot masks one of this many equal parts at a time: mask rates 1/16, 1/2 and 1."""

TRUST = (0.9, 0.6, 1.0)
"""How far a single draw tells a token's mean cost from that of all tokens, at each of the rates.

Where few tokens are masked the rest decides, and where all are nothing is random; in between a
token's cost depends on which neighbours are visible. Any values leave the estimate unbiased.
"""


@dataclass(frozen=True)
class Balanced(Estimator):
    """Masked counts with a forecast, the counts that vary most drawn most.

    Rows have orders of their own: arcs of one common order mask tokens more evenly, but leave the
    same ones out together, and that correlates what the forecast misses.

    Attributes:
        samples: rows per window and replicate.
    """

    samples: int = 16

    name: ClassVar[str] = "balanced"

    @property
    def draws(self) -> int:
        return self.samples

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)
        require_absorbing(self.name, family)

    def learn(self, batch: WindowBatch, scorer: Scorer) -> Tensor:
        """[B, 3, L] forecast at each of the pilot's mask rates."""
        found = []
        for number, (arcs, trust) in enumerate(zip(ARCS, TRUST, strict=True)):
            cost = _sweep(batch, scorer, arcs, number)
            size = batch.sizes.clamp(min=1)
            mean = batch.blocks.spread(batch.blocks.split(cost, 0.0).sum(-1) / size)
            found.append((mean + trust * (cost - mean)) * batch.scorable)
        return torch.stack(found, 1)

    def allocate(self, batch: WindowBatch, scorer: Scorer) -> Tensor:
        """[B, PARTS] factors of the fixed density, by one row of each window in each of its parts.

        Their counts are the middles of the parts.
        """
        sizes, kind = torch.unique(batch.sizes, return_inverse=True)
        density, knots = densities(sizes)[kind], hats(sizes)[kind]
        missed = []
        for part in range(PARTS):
            v = torch.full(batch.sizes.shape, (part + 0.5) / PARTS, dtype=torch.float64)
            u = batch.uniforms(Stream.POSITION, part, PARTS)
            nats = _missed(batch, scorer, density, knots, v, u)
            missed.append(batch.blocks.split(nats, 0.0).sum(-1))
        return neyman(torch.stack(missed, 1), batch.sizes > 0)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        assert batch.allocation is not None
        sizes, kind = torch.unique(batch.sizes, return_inverse=True)
        knots = hats(sizes)[kind]
        density = allocated(densities(sizes)[kind], batch.allocation[:, None])
        nats = _forecast(batch, knots.sum(-2) / batch.sizes.clamp(min=1)[..., None])
        for s in range(self.samples):
            u = batch.uniforms(Stream.POSITION, s, self.draws)
            nats += _missed(batch, scorer, density, knots, batch.v[:, s], u) / self.samples
        return {"diffusion": nats}


def hats(sizes: Tensor) -> Tensor:
    """[N, k + 1, 3] weights that interpolate the pilot's mask rates at k / n, linearly."""
    n = sizes.to(torch.float64)[:, None]
    k = torch.arange(int(sizes.max()) + 1, dtype=torch.float64)
    low, middle, high = (1.0 / arcs for arcs in ARCS)
    rate = (k / n.clamp(min=1.0)).clamp(low, high)
    rise = ((rate - low) / (middle - low)).clamp(max=1.0)
    last = ((rate - middle) / (high - middle)).clamp(min=0.0)
    weights = torch.stack([1.0 - rise, rise - last, last], -1)
    return weights * ((k >= 1.0) & (k <= n))[..., None]


def _missed(
    batch: WindowBatch, scorer: Scorer, density: Tensor, knots: Tensor, v: Tensor, u: Tensor
) -> Tensor:
    """[B, L] weighted nats of one row per window that the forecast misses.

    Args:
        batch: the windows.
        scorer: the network.
        density: [B, blocks, k + 1] p(k).
        knots: [B, blocks, k + 1, 3] as of `hats`.
        v: [B, blocks] float64 where in the distribution of k.
        u: [B, L] order of the positions.
    """
    count = drawn(v, density, batch.sizes)
    rank = ranks(u, batch.blocks, batch.scorable)
    weight = weights(count, density)
    noise = hit_lowest(rank, count, weight, batch.blocks, batch.scorable, u)
    at = count[..., None, None].expand(*count.shape, 1, len(ARCS))
    known = _forecast(batch, knots.gather(2, at).squeeze(2)) * noise.weight * noise.hit
    return scorer.nats(batch.x0, noise, batch.real) - known


def _rotated(batch: WindowBatch, rank: Tensor, start: Tensor) -> Tensor:
    """[B, L] ranks counted from `start` [B, blocks] on, around the circle of each block."""
    size = batch.blocks.spread(batch.sizes.clamp(min=1))
    moved = (rank - batch.blocks.spread(start)) % size
    return torch.where(batch.scorable, moved, rank)


def _forecast(batch: WindowBatch, weights: Tensor) -> Tensor:
    """[B, L] the pilot's costs at its rates, weighted [B, blocks, 3]."""
    assert batch.learned is not None
    spread = torch.stack([batch.blocks.spread(w) for w in weights.unbind(-1)], 1)
    return (batch.learned * spread).sum(1)


def _sweep(batch: WindowBatch, scorer: Scorer, arcs: int, number: int) -> Tensor:
    """[B, L] what every scorable token costs when its part of `arcs` parts is masked."""
    u = batch.uniforms(Stream.POSITION, number, len(ARCS))
    rank = ranks(u, batch.blocks, batch.scorable)
    cost = torch.zeros(batch.x0.shape, dtype=torch.float64)
    one = torch.ones(batch.sizes.shape, dtype=torch.float64)
    for arc in range(arcs):
        start, stop = (batch.sizes * end // arcs for end in (arc, arc + 1))
        if not bool((stop > start).any()):
            continue
        moved = _rotated(batch, rank, start)
        noise = hit_lowest(moved, stop - start, one, batch.blocks, batch.scorable, u)
        cost += scorer.nats(batch.x0, noise, batch.real)
    return cost
