"""How many replicates a number takes: for its interval to be right, and to be as narrow as asked.

A precision is reached in two stages (Stein, 1945). The spread s of a pilot of P replicates says
that t s / sqrt(R) is narrow enough, t being Student's quantile for P - 1 degrees of freedom; R
replicates with noise of their own are the number, and that is its interval. It is never wider than
asked, and it is right: R depends on the pilot alone, so that the mean of the R is unbiased and does
not know s.

Going on until the spread of counted replicates is small enough is not. Costs are skewed: few draws
with large weights make mean and spread large together, and replicates that decide how many follow
are stopped where they lie low, which biases their mean and narrows their interval.
"""

import math

import numpy as np
import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.likelihood.bound import student_t_quantile
from textdiff.likelihood.windows import Windows

MIN_REPLICATES = 8
MAX_REPLICATES = 4096

LEAST_DRAWS = 64
"""Draws of noise in all replicates together below which their mean is far from normal."""

PILOT = 2**42
"""Number of the first replicate of a pilot: random numbers that no counted replicate has."""

LEAST_PILOT = 16
"""Replicates of a pilot: not knowing the spread any better takes a fifth more than knowing it."""


def least_replicates(
    windows: Windows, family: Family, draws: int, each_document: bool = False
) -> int:
    """Replicates that it takes for Student's t to be right about their mean.

    Args:
        windows: what is scored.
        family: says how windows fall into blocks, each of which draws noise of its own.
        draws: noise draws per block and replicate.
        each_document: for it to be right about every document; else about all of them together.
    """
    totals = document_draws(windows, family, draws)
    least = int(totals[totals > 0].min() if each_document else totals.sum())
    return max(MIN_REPLICATES, -(-LEAST_DRAWS // least))


def document_draws(windows: Windows, family: Family, draws: int) -> Tensor:
    """[D] int64 noise draws of every document in a replicate.

    Args:
        windows: what is scored.
        family: says how windows fall into blocks.
        draws: noise draws per block and replicate.
    """
    size = family.blocks(int(windows.lengths.max())).size
    blocks = torch.tensor([_scored_blocks(windows, w, size) for w in range(len(windows.tokens))])
    totals = torch.zeros(len(windows.document_tokens), dtype=torch.int64)
    return totals.index_add(0, windows.document, blocks) * draws


def _scored_blocks(windows: Windows, window: int, size: int) -> int:
    """Blocks of a window that have a token to score."""
    if windows.scored is None:
        return -(-len(windows.tokens[window]) // size)
    return len(np.unique(np.flatnonzero(windows.scored[window]) // size))


def replicates_for(precision: float, pilot: Tensor) -> int:
    """Replicates whose 95 % interval of the perplexity is within `precision` of it.

    Args:
        precision: the share of the perplexity on either side.
        pilot: [P] nats per token of the pilot's replicates, whose spread the interval is of.
    """
    width = student_t_quantile(0.975, len(pilot) - 1) * float(pilot.std())
    return math.ceil(min((width / math.log1p(precision)) ** 2, MAX_REPLICATES))
