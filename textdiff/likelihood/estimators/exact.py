"""The bound itself, by enumeration of every set of masked positions.

All blocks of a window are enumerated at once: given the clean blocks before them they are
independent problems, which a single row of the two-stream layout poses together. The rows of a
window are 2 ** b - 1, where b is the tokens of a block, however long the window is.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.estimator import (
    Estimator,
    Parts,
    require_continuous,
    require_time_free,
)
from textdiff.likelihood.estimators.subsets import NEVER, ranks
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel

LARGEST = 14
"""Most tokens of a block that are enumerated: 16,383 rows per window."""


@dataclass(frozen=True)
class Exact(Estimator):
    """Sum over subsets S of CE_S / (|S| C(n, |S|)), block by block, without any error."""

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)
        require_time_free(self.name, denoiser, family)
        size = most_scored(windows, family)
        if size > LARGEST:
            where = "window" if family.block_size is None else f"block of {family.block_size}"
            raise ConfigError(
                f"estimator exact enumerates 2 ** {size} sets of masked tokens per {where}, each a "
                f"network row per window, and takes at most 2 ** {LARGEST}; use masked_count or "
                "balanced, or a model in smaller blocks"
            )

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        nats = torch.zeros(batch.x0.shape, dtype=torch.float64)
        order = torch.arange(batch.x0.shape[1], dtype=torch.float64).expand(batch.x0.shape)
        rank = ranks(order / (batch.x0.shape[1] + 1.0), batch.blocks, batch.scorable)
        largest = int(batch.sizes.max())
        half = torch.full((1, 1), 0.5, dtype=torch.float64)
        weights = torch.tensor(
            [
                [1.0 / (k * math.comb(n, k)) if 1 <= k <= n else 0.0 for k in range(largest + 1)]
                for n in range(largest + 1)
            ],
            dtype=torch.float64,
        )
        for codes in torch.split(torch.arange(1, 2**largest), max(1, 2**12 // len(batch.x0))):
            each = len(codes)
            code = codes.repeat(len(batch.x0))[:, None]
            x0, real, scorable, place, sizes = (
                x.repeat_interleave(each, 0)
                for x in (batch.x0, batch.real, batch.scorable, rank, batch.sizes)
            )
            whole = batch.blocks.spread(sizes)
            hit = scorable & (code < 2**whole) & ((code >> place) % 2 == 1)
            count = batch.blocks.split(hit, False).sum(-1)
            weight = batch.blocks.spread(weights[sizes, count])
            u = torch.where(hit, 0.25, 0.75).to(torch.float64).masked_fill(~scorable, NEVER)
            found = scorer.nats(x0, Noise(half, half, u, weight), real)
            nats += torch.unflatten(found, 0, (-1, each)).sum(1)
        return {"diffusion": nats}


def most_scored(windows: Windows, family: Family) -> int:
    """The most tokens of any block that are scored."""
    if windows.scored is None:
        return family.blocks(max(len(tokens) for tokens in windows.tokens)).size
    size = family.block_size
    return max(
        int(np.add.reduceat(scored, np.arange(0, len(scored), size or len(scored))).max())
        for scored in windows.scored
    )
