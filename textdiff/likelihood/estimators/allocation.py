"""How many rows go to which number of masked tokens: a fixed density, corrected by a pilot.

An estimate's error is least when counts are drawn in proportion to the deviation of what a row with
that count adds (Neyman, 1934). The fixed density is roughly that deviation as it was measured on a
trained character model. A pilot of one row in each of its `PARTS` equal parts then measures it for
one window under one network: where the rows miss the forecast by more than elsewhere, more are
drawn. A row says little, so a window of one block follows its pilot a small part of the way, and
one of many blocks, each of which is a measurement of its own, nearly all of it.

No allocation biases: every count keeps a positive chance, and rows are weighted by its inverse. The
pilot's rows are used for nothing else, so the allocation is independent of the rows drawn by it.
"""

import torch
from torch import Tensor

PARTS = 4
"""Parts of equal chance under the fixed density; the pilot draws one row in each."""

BELIEF = 8.0
"""How many measured blocks the fixed density counts for."""

NEGLIGIBLE = 1e-3
"""Nats per block below which what is missed may be rounding, and tells nothing."""

STEPS = 4
"""Factors are rounded to this many steps per octave.

Rounding errors, which depend on the batch, then leave all counts as they are, and two models that
are compared mostly see the same masks. It costs a quarter of a percent of the variance.
"""


def densities(sizes: Tensor) -> Tensor:
    """[N, k + 1] float64 fixed p(k) of blocks of `sizes` [N] tokens: about a row's deviation.

    What a row with k masked tokens adds to the error falls with the share that is masked, and the
    forecast is at its worst for the smallest counts.
    """
    n = sizes.to(torch.float64)[:, None]
    k = torch.arange(int(sizes.max()) + 1, dtype=torch.float64)
    spread = ((1.0 - k / (n + 1.0)).clamp(min=0.0) * (1.0 + 4.0 / k.clamp(min=1.0))).sqrt()
    spread = spread.where((k >= 1.0) & (k <= n), 0.0)
    return spread / spread.sum(1, keepdim=True).clamp(min=1e-300)


def neyman(missed: Tensor, real: Tensor) -> Tensor:
    """[B, PARTS] factors of the fixed density, 1/2 to 2: all 1 where the pilot confirms it.

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
    """[..., k + 1] p(k) with every part of the fixed density times its factor.

    Args:
        density: [..., k + 1] fixed p(k); a row of zeros stays one.
        factors: [..., PARTS] factors, of each density or of several in common.
    """
    middle = density.cumsum(-1) - density / 2.0
    part = (middle * PARTS).to(torch.int64).clamp(max=PARTS - 1)
    scaled = density * factors.expand(*part.shape[:-1], PARTS).gather(-1, part)
    return scaled / scaled.sum(-1, keepdim=True).clamp(min=1e-300)


def drawn(v: Tensor, density: Tensor, sizes: Tensor) -> Tensor:
    """[...] int64 counts where the distributions [..., k + 1] pass `v` [...]; 0 if `sizes` is."""
    cumulative = density.cumsum(-1)
    count = torch.searchsorted(cumulative, v[..., None].contiguous(), right=True).squeeze(-1)
    return torch.minimum(count.clamp(min=1), sizes)  # rounding may leave the sum below 1


def weights(count: Tensor, density: Tensor) -> Tensor:
    """[...] float64 1 / (k p(k)): what makes rows of `count` masked tokens unbiased; 0 for none."""
    chance = count * density.gather(-1, count[..., None]).squeeze(-1)
    return torch.where(count > 0, 1.0 / chance.clamp(min=1e-300), 0.0)
