"""Estimators by orders in which tokens are revealed, and by all sets of masked tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from textdiff.diffusion.noise import Noise
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators.estimator import NEVER, Estimator, WindowBatch, mask_lowest
from textdiff.section import Whole, torch

if TYPE_CHECKING:
    from torch import Tensor

    from textdiff.diffusion.family import Family
    from textdiff.likelihood.estimators.estimator import Parts
    from textdiff.likelihood.scorer import Reading, Scorer
    from textdiff.likelihood.windows import Windows
    from textdiff.models import Denoiser


LARGEST = 14
"""Most tokens of a block that are enumerated: 16,383 rows per window."""


class AnyOrder(Estimator):
    """Random orders, each token scored given those before it: the bound, for masked noise.

    A mean over orders of their chains (Eq. 2, arXiv:2110.02037), n rows per window. Scoring all
    masked tokens in every row, not only the next one, would not lower the variance: along one
    order, what a token leaves unsaid the others say, and the more consistent the model the less
    their sum varies.
    """

    kind: Literal["any_order"] = "any_order"
    samples: Whole = Field(1, ge=1, description="orders per window and replicate")

    continuous: ClassVar[bool] = True
    absorbing: ClassVar[bool] = True
    time_free: ClassVar[bool] = True

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        from textdiff.likelihood.scorer import nelbo

        nats = batch.zeros()
        for s in range(self.samples):
            nats += chain(batch, batch.orders(s, self.samples), scorer, nelbo) / self.samples
        return {"diffusion": nats}


class Importance(Estimator):
    """The mean likelihood over several random orders: tighter than the bound, for masked noise.

    -log of the mean over K orders (Eq. 8, arXiv:1509.00519, over orders). K = 1 is the negative
    ELBO; the expectation never rises with K and falls to the order-averaged likelihood of the
    model. Orders are drawn per block, so every block has its own mean.
    """

    kind: Literal["importance"] = "importance"
    orders: Whole = Field(8, ge=1, description="orders to average over: more, a tighter bound")

    attributes: ClassVar[bool] = False
    absorbing: ClassVar[bool] = True
    time_free: ClassVar[bool] = True

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        chains = []
        for k in range(self.orders):
            nats = chain(batch, batch.orders(k, self.orders), scorer)
            chains.append(batch.blocks.split(nats, 0.0).sum(-1))
        nats = math.log(self.orders) - (-torch.stack(chains)).logsumexp(0)  # [B, blocks]
        share = nats / batch.sizes.clamp(min=1)  # spread evenly: not those of single tokens
        return {"diffusion": batch.blocks.spread(share) * batch.scorable}


class ChainRule(Estimator):
    """Left to right, exact: the likelihood of the network as an autoregressive model.

    It is the likelihood of a model that decodes in this order, and no bound on that of the
    diffusion model, which averages over orders.
    """

    kind: Literal["chain_rule"] = "chain_rule"

    exact: ClassVar[bool] = True
    absorbing: ClassVar[bool] = True
    time_free: ClassVar[bool] = True

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        length = batch.x0.shape[1]
        first = 1.0 - (torch.arange(length, dtype=torch.float64) + 0.5) / length  # [L]
        return {"diffusion": chain(batch, first.expand(batch.x0.shape), scorer)}


class Exact(Estimator):
    """The bound without any error, by enumerating sets of masked tokens: small blocks only.

    Sum over subsets S of CE_S / (|S| C(n, |S|)), block by block. All blocks of a window are
    enumerated at once: given the clean blocks before them they are independent problems, which a
    single row of the two-stream layout poses together. The rows of a window are 2 ** b - 1, where b
    is the tokens of a block, however long the window is.
    """

    kind: Literal["exact"] = "exact"

    exact: ClassVar[bool] = True
    continuous: ClassVar[bool] = True
    absorbing: ClassVar[bool] = True
    time_free: ClassVar[bool] = True

    def check(self, denoiser: Denoiser, family: Family, windows: Windows) -> None:
        super().check(denoiser, family, windows)
        size = windows.most_scored(family)
        if size > LARGEST:
            where = "window" if family.block_size is None else f"block of {family.block_size}"
            raise ConfigError(
                f"estimator exact enumerates 2 ** {size} sets of masked tokens per {where}, each a "
                f"network row per window, and takes at most 2 ** {LARGEST}; use masked_count or "
                "balanced, or a model in smaller blocks",
                code="too_many_subsets",
            )

    def score(self, batch: WindowBatch, scorer: Scorer) -> Parts:
        nats, length = batch.zeros(), batch.x0.shape[1]
        order = torch.arange(length, dtype=torch.float64).expand(batch.x0.shape)
        rank = batch.ranks(order / (length + 1.0))
        half = torch.full((1, 1), 0.5, dtype=torch.float64)
        largest = int(batch.sizes.max())
        weights = subset_weights(largest)
        for codes in torch.split(torch.arange(1, 2**largest), max(1, 2**12 // len(batch.x0))):
            each = len(codes)
            code = codes.repeat(len(batch.x0))[:, None]  # [B each, 1]
            x0, real, scorable, place, sizes = (
                x.repeat_interleave(each, 0)
                for x in (batch.x0, batch.real, batch.scorable, rank, batch.sizes)
            )
            whole = batch.blocks.spread(sizes)
            masked = scorable & (code < 2**whole) & ((code >> place) % 2 == 1)
            count = batch.blocks.split(masked, False).sum(-1)
            weight = batch.blocks.spread(weights[sizes, count])
            u = torch.where(masked, 0.25, 0.75).to(torch.float64).masked_fill(~scorable, NEVER)
            cost = scorer.nats(x0, Noise(half, half, u, weight), real)
            nats += torch.unflatten(cost, 0, (-1, each)).sum(1)
        return {"diffusion": nats}


def chain(batch: WindowBatch, u: Tensor, scorer: Scorer, read: Reading | None = None) -> Tensor:
    """Return the nats of every token given those revealed before it, [B, L].

    It takes n rows per window. Blocks are revealed in parallel, each given the ones before it.

    Args:
        batch: the windows.
        u: [B, L] float64 in (0, 1); a block's largest is revealed first.
        scorer: the network.
        read: what is read off its predictions; None: the likelihood. Weights are 1.
    """
    from textdiff.likelihood.scorer import likelihood

    most = int(batch.sizes.max())
    counts = torch.arange(1, most + 1)[:, None]
    count = torch.where(counts <= batch.sizes[:, None], counts, 0).flatten(0, 1)  # [B n, blocks]
    rank, x0, real, scorable, spread = (
        x.repeat_interleave(most, 0)
        for x in (batch.ranks(u), batch.x0, batch.real, batch.scorable, u)
    )  # [B n, L] each
    one = torch.ones_like(count, dtype=torch.float64)
    noise = mask_lowest(rank, count, one, batch.blocks, scorable, spread)
    following = rank == batch.blocks.spread(count) - 1  # revealed next; masked itself
    nats = scorer.nats(x0, noise, real, read or likelihood, following)
    return torch.unflatten(nats, 0, (-1, most)).sum(1)


def subset_weights(largest: int) -> Tensor:
    """Return 1 / (k C(n, k)) for blocks of n tokens of which k are masked, [n, k]; 0 for none."""
    sizes = range(largest + 1)
    rows = [[1.0 / (k * math.comb(n, k)) if 1 <= k <= n else 0.0 for k in sizes] for n in sizes]
    return torch.tensor(rows, dtype=torch.float64)
