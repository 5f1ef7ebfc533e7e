"""How many replicates a number takes: for its interval to be right, and to be as narrow as asked.

A precision is planned from a pilot whose draws are no part of the number. Costs are skewed: few
draws with large weights make mean and spread large together. Replicates that decide how many follow
are therefore stopped where they happen to lie low and close to each other, and counting them in
biases the mean by skewness / sqrt(replicates) standard errors, and the interval with it. Counted
replicates that had no say have the law of a fixed number of them, whatever the pilot finds.
"""

import math

import numpy as np
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.likelihood.protocols import Windows

MIN_REPLICATES = 8
MAX_REPLICATES = 4096

LEAST_DRAWS = 64
"""Draws of noise in all replicates together below which their mean is far from normal."""

PILOT = 2**42
"""Number of the first replicate of a pilot: random numbers that no counted replicate has."""

PILOT_SHARE = 4
"""A pilot grows to this part of the replicates that it asks for: few say little about a spread."""


def least_replicates(windows: Windows, family: Family, draws: int) -> int:
    """Replicates that it takes for Student's t to be right about their mean.

    Args:
        windows: what is scored.
        family: says how windows fall into blocks, each of which draws noise of its own.
        draws: noise draws per block and replicate.
    """
    size = family.blocks(int(windows.lengths.max())).size
    blocks = 0
    for w, tokens in enumerate(windows.tokens[:LEAST_DRAWS]):  # more windows are enough anyway
        scored = np.ones(len(tokens), bool) if windows.scored is None else windows.scored[w]
        blocks += len(np.unique(np.flatnonzero(scored) // size))
    return max(MIN_REPLICATES, -(-LEAST_DRAWS // (blocks * draws)))


def replicates_for(precision: float, pilot: Tensor) -> int:
    """Replicates whose 95 % interval of the perplexity is likely within `precision` of it.

    Likely: for the spread that the pilot exceeds nine times in ten (a chi-square quantile by Wilson
    & Hilferty, 1931). Student's t takes (z ** 2 + 1) / 2 replicates more than the normal law.

    Args:
        precision: the share of the perplexity on either side.
        pilot: [R] nats per token of replicates.
    """
    degrees, z, least = len(pilot) - 1, 1.959964, 1.281552
    part = (1.0 - 2.0 / (9.0 * degrees) - least * math.sqrt(2.0 / (9.0 * degrees))) ** 3
    variance = float(pilot.var()) / part
    need = z**2 * variance / math.log1p(precision) ** 2 + (z**2 + 1.0) / 2.0
    return math.ceil(min(need, MAX_REPLICATES))
