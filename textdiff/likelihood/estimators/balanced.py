"""Counts with the known part of every token's cost taken out: the least variance per row.

Two things make an estimate by counts vary. The cost per token rises with the number of masked
ones, and tokens differ: with few of them masked, their large weight falls on whichever were drawn.
Both are predictable. A pilot masks every token once at three mask rates. Between these, its costs
are interpolated to a forecast d_i(k) of what token i costs with k masked. Rows then estimate only
what the forecast misses:

    sum_i mean_k d_i(k)  +  E[ w(k) sum over masked i of (CE_i - d_i(k)) ],  w(k) = 1 / (k p(k)),

which has the same expectation whatever the forecast, because i is masked with probability k / n,
and whatever p(k) > 0.

An estimate's error is least when counts are drawn in proportion to the deviation of what a row with
that count adds (Neyman, 1934). The fixed density of counts is roughly that deviation as it was
measured on a trained character model. A pilot of one row in each of its `PARTS` equal parts then
measures it for one window under one network: where rows miss the forecast by more than elsewhere,
more are drawn. A row shows little, so a window of one block follows its pilot a small part of the
way. One of many blocks, each of which is a measurement of its own, follows it nearly all of it. On
a small character model in blocks of 8 the pilot takes 7 to 9 % off the variance: 4, 8 and 16 rows,
each figure to 5 %. With a single block it gains nothing that can be measured.

No allocation biases: every count keeps a positive chance, and rows are weighted by its inverse. The
pilots' draws are their own and are used for nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.likelihood.estimators.estimator import Estimator, WindowBatch, mask_lowest
from textdiff.section import Whole, torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.likelihood.estimators.estimator import Parts
    from textdiff.likelihood.scorer import Scorer

ARCS = (16, 2, 1)
"""The pilot masks one of this many equal parts at a time: mask rates 1/16, 1/2 and 1."""

TRUST = (0.9, 0.6, 1.0)
"""Weight of a token's single draw against the mean of all tokens, at each of the rates.

Where few tokens are masked the rest decides, and where all are nothing is random; in between a
token's cost depends on which neighbours are visible. Any values leave the estimate unbiased.
"""


PARTS = 4
"""Parts of equal chance under the fixed density; the pilot draws one row in each."""

BELIEF = 8.0
"""Measured blocks that the fixed density counts for."""

NEGLIGIBLE = 1e-3
"""Nats per block below which what is missed may be rounding."""

STEPS = 4
"""Factors are rounded to this many steps per octave.

Rounding errors, which depend on the batch, then leave all counts as they are, and two models that
are compared mostly see the same masks. It costs a quarter of a percent of the variance.
"""


class Balanced(Estimator):
    """Masked counts less a forecast of their cost: least variance per row, for masked noise.

    Counts that vary most are drawn most. Rows have orders of their own: arcs of one common order
    mask tokens more evenly, but leave the same ones out together, and that correlates what the
    forecast misses.
    """

    kind: Literal["balanced"] = "balanced"
    samples: Whole = Field(16, ge=1, description="rows per window and replicate")

    continuous: ClassVar[bool] = True
    absorbing: ClassVar[bool] = True

    @property
    def draws(self) -> int:
        return self.samples

    def learn(self, batch: WindowBatch, scorer: Scorer) -> Tensor:
        """Return the forecast at each of the pilot's mask rates, [B, 3, L]."""
        forecasts = []
        for number, (arcs, trust) in enumerate(zip(ARCS, TRUST, strict=True)):
            cost = _sweep(batch, scorer, arcs, number)
            size = batch.sizes.clamp(min=1)
            mean = batch.blocks.spread(batch.blocks.split(cost, 0.0).sum(-1) / size)
            forecasts.append((mean + trust * (cost - mean)) * batch.scorable)
        return torch.stack(forecasts, 1)

    def allocate(self, batch: WindowBatch, scorer: Scorer) -> Tensor:
        """Return factors of the fixed density, [B, PARTS], from a row of each window in each part.

        Their counts are the middles of the parts.
        """
        sizes, at = torch.unique(batch.sizes, return_inverse=True)
        density, knots = densities(sizes)[at], hats(sizes)[at]
        missed = []
        for number in range(PARTS):
            v = torch.full(batch.sizes.shape, (number + 0.5) / PARTS, dtype=torch.float64)
            u = batch.orders(number, PARTS)
            nats = _missed(batch, scorer, density, knots, v, u)
            missed.append(batch.blocks.split(nats, 0.0).sum(-1))
        return neyman(torch.stack(missed, 1), batch.sizes > 0)

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        assert batch.allocation is not None
        sizes, at = torch.unique(batch.sizes, return_inverse=True)
        knots = hats(sizes)[at]
        density = allocated(densities(sizes)[at], batch.allocation[:, None])
        nats = _forecast(batch, knots.sum(-2) / batch.sizes.clamp(min=1)[..., None])
        for s in range(self.samples):
            u = batch.orders(s, self.draws)
            nats += _missed(batch, scorer, density, knots, batch.v[:, s], u) / self.samples
        return {"diffusion": nats}


def hats(sizes: Tensor) -> Tensor:
    """Return weights that interpolate the pilot's mask rates at k / n, [N, k + 1, 3]."""
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
    """Return the weighted nats of one row per window that the forecast misses, [B, L].

    Args:
        batch: the windows.
        scorer: the network.
        density: [B, blocks, k + 1] p(k).
        knots: [B, blocks, k + 1, 3] as of `hats`.
        v: [B, blocks] float64 where in the distribution of k.
        u: [B, L] order of the positions.
    """
    count = drawn(v, density, batch.sizes)
    rank = batch.ranks(u)
    weight = weights(count, density)
    noise = mask_lowest(rank, count, weight, batch.blocks, batch.scorable, u)
    at = count[..., None, None].expand(*count.shape, 1, len(ARCS))
    known = _forecast(batch, knots.gather(2, at).squeeze(2)) * noise.weight * noise.corrupted
    return scorer.nats(batch.x0, noise, batch.real) - known


def _rotated(batch: WindowBatch, rank: Tensor, start: Tensor) -> Tensor:
    """Return ranks counted from `start` [B, blocks] on, around the circle of each block, [B, L]."""
    size = batch.blocks.spread(batch.sizes.clamp(min=1))
    moved = (rank - batch.blocks.spread(start)) % size
    return torch.where(batch.scorable, moved, rank)


def _forecast(batch: WindowBatch, weights: Tensor) -> Tensor:
    """Return the pilot's costs at its rates with weights [B, blocks, 3], [B, L]."""
    assert batch.learned is not None
    spread = torch.stack([batch.blocks.spread(w) for w in weights.unbind(-1)], 1)
    return (batch.learned * spread).sum(1)


def _sweep(batch: WindowBatch, scorer: Scorer, arcs: int, number: int) -> Tensor:
    """Return the cost of every scorable token when its part of `arcs` parts is masked, [B, L]."""
    u = batch.orders(number, len(ARCS))  # [B, L]
    rank = batch.ranks(u)
    cost = batch.zeros()
    one = torch.ones(batch.sizes.shape, dtype=torch.float64)
    for arc in range(arcs):
        start, stop = (batch.sizes * end // arcs for end in (arc, arc + 1))
        if not bool((stop > start).any()):
            continue
        moved = _rotated(batch, rank, start)
        noise = mask_lowest(moved, stop - start, one, batch.blocks, batch.scorable, u)
        cost += scorer.nats(batch.x0, noise, batch.real)
    return cost


def densities(sizes: Tensor) -> Tensor:
    """Return the fixed p(k) of blocks of `sizes` [N] tokens, [N, k + 1]: about a row's deviation.

    What a row with k masked tokens adds to the error falls with the share that is masked. The
    forecast is at its worst for the smallest counts.
    """
    n = sizes.to(torch.float64)[:, None]
    k = torch.arange(int(sizes.max()) + 1, dtype=torch.float64)
    spread = ((1.0 - k / (n + 1.0)).clamp(min=0.0) * (1.0 + 4.0 / k.clamp(min=1.0))).sqrt()
    spread = spread.where((k >= 1.0) & (k <= n), 0.0)
    return spread / spread.sum(1, keepdim=True).clamp(min=1e-300)


def neyman(missed: Tensor, real: Tensor) -> Tensor:
    """Return factors of the fixed density, 1/2 to 2, [B, PARTS]; 1 where the pilot confirms it.

    Args:
        missed: [B, PARTS, blocks] nats that the pilot's rows add to the estimate, weighted.
        real: [B, blocks] bool, blocks that have a token to score.
    """
    blocks = real.sum(-1, keepdim=True).to(torch.float64)
    square = (missed.square() * real[:, None]).sum(-1) + (blocks * NEGLIGIBLE**2).clamp(min=1e-300)
    relative = square / square.mean(-1, keepdim=True)
    squared = (BELIEF + blocks * relative) / (BELIEF + blocks)
    return (2.0 ** ((STEPS / 2 * squared.log2()).round() / STEPS)).clamp(min=0.5)


def allocated(density: Tensor, factors: Tensor) -> Tensor:
    """Return p(k) with every part of the fixed density times its factor, [..., k + 1].

    Args:
        density: [..., k + 1] fixed p(k); a row of zeros stays one.
        factors: [..., PARTS] factors, of each density or of several in common.
    """
    middle = density.cumsum(-1) - density / 2.0
    piece = (middle * PARTS).to(torch.int64).clamp(max=PARTS - 1)  # [..., k + 1]
    scaled = density * factors.expand(*piece.shape[:-1], PARTS).gather(-1, piece)
    return scaled / scaled.sum(-1, keepdim=True).clamp(min=1e-300)


def drawn(v: Tensor, density: Tensor, sizes: Tensor) -> Tensor:
    """Return the counts [...] where distributions [..., k + 1] pass `v` [...]; 0 if `sizes` is."""
    cumulative = density.cumsum(-1)
    count = torch.searchsorted(cumulative, v[..., None].contiguous(), right=True).squeeze(-1)
    return torch.minimum(count.clamp(min=1), sizes)  # rounding may leave the sum below 1


def weights(count: Tensor, density: Tensor) -> Tensor:
    """Return 1 / (k p(k)) of counts [...]: rows weighted by it are unbiased; 0 for none."""
    chance = count * density.gather(-1, count[..., None]).squeeze(-1)
    return torch.where(count > 0, 1.0 / chance.clamp(min=1e-300), 0.0)
