"""Random orders with all their terms: every number of masked tokens, in nested sets."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.randomness import Stream
from textdiff.likelihood.estimators.estimator import (
    Estimator,
    Parts,
    require_continuous,
    require_time_free,
)
from textdiff.likelihood.estimators.subsets import hit_lowest, ranks
from textdiff.likelihood.estimators.view import View
from textdiff.likelihood.protocols import Windows
from textdiff.likelihood.scorer import Scorer
from textdiff.models import TextDiffusionModel


@dataclass(frozen=True)
class AnyOrder(Estimator):
    """The bound as a mean over orders (Eq. 2, arXiv:2110.02037), n rows per window and order.

    With k tokens masked, all of them are asked for, not only the one that the order reveals next:
    the mean over which of them it is costs nothing more.

    Attributes:
        samples: orders per window and replicate.
    """

    samples: int = 1

    name: ClassVar[str] = "any_order"

    def check(self, denoiser: TextDiffusionModel, family: Family, windows: Windows) -> None:
        require_continuous(self.name, family)
        require_time_free(self.name, denoiser, family)

    def score(self, view: View, scorer: Scorer) -> Parts:
        nats = torch.zeros(view.x0.shape, dtype=torch.float64)
        for s in range(self.samples):
            u = view.uniforms(Stream.POSITION, s, self.samples)
            rows = every_count(view, ranks(u, view.blocks, view.scorable), u)
            nats += sum_rows(view, rows, scorer) / self.samples
        return {"diffusion": nats}


@dataclass(frozen=True)
class CountRows:
    """Rows of a view with 1, 2, ... masked positions in every block, R of each window.

    Attributes:
        rank: [B * R, L] ranks of the positions.
        count: [B * R, blocks] how many of the lowest are masked; 0 past the end of a short block.
        u: [B * R, L] uniforms.
    """

    rank: Tensor
    count: Tensor
    u: Tensor

    @property
    def each(self) -> Tensor:
        """[B * R, blocks] float64 weight 1 / k, the mean over k of n / k."""
        return 1.0 / self.count.clamp(min=1).to(torch.float64)


def every_count(view: View, rank: Tensor, u: Tensor) -> CountRows:
    """Each window of a view with every number of masked positions, the nested sets of one order."""
    most = int(view.sizes.max())
    counts = torch.arange(1, most + 1)[:, None]  # [R, 1]
    sizes = view.sizes[:, None]  # [B, 1, blocks]
    count = torch.where(counts <= sizes, counts, 0).flatten(0, 1)
    return CountRows(rank.repeat_interleave(most, 0), count, u.repeat_interleave(most, 0))


def sum_rows(view: View, rows: CountRows, scorer: Scorer) -> Tensor:
    """[B, L] weighted nats, summed over the rows of each window."""
    each = len(rows.rank) // len(view.x0)
    x0, real, scorable = (x.repeat_interleave(each, 0) for x in (view.x0, view.real, view.scorable))
    noise = hit_lowest(rows.rank, rows.count, rows.each, view.blocks, scorable, rows.u)
    return torch.unflatten(scorer.nats(x0, noise, real), 0, (-1, each)).sum(1)
