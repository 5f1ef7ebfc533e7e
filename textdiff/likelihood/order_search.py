"""Search for the fixed order of positions under which texts are most likely.

Texts written one token per call in a fixed order have the likelihood of a chain of sets: log p(x) =
sum_i log p(x_i | x_S), S the positions before i. One network row gives the cost of every position
that may follow S, in all blocks of a window at once. So the search goes over sets, not orders: the
least cost of a set is that of the set before it and of the position that completes it. All 2 ** n
sets give the best of n! orders (Held and Karp, 1962); a beam keeps the sets of least cost
among those of one size. The order is the same in all blocks and texts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import NEVER, Noise
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators import build_estimator
from textdiff.likelihood.estimators.estimator import WindowBatch
from textdiff.likelihood.replicates import ReplicateDraws
from textdiff.likelihood.scorer import Scorer, likelihood
from textdiff.likelihood.stopping import EstimateOptions
from textdiff.likelihood.windows import Windows, with_rest
from textdiff.models import Denoiser

Costs = Callable[[tuple[int, ...]], list[float]]
"""costs(revealed places) -> nats of every place given those; of revealed ones they are not read."""


@dataclass(frozen=True)
class FixedOrder:
    """An order of the places of a block, or of the canvas, and its cost.

    Attributes:
        places: the order, one token per call.
        nats: cost of the texts that it was searched on, over all of them.
        sets: sets of revealed places whose costs were computed.
        best: whether no order costs less on these texts: no set was left out.
        tokens: of these texts.
        rows: network rows that the search took.
    """

    places: tuple[int, ...]
    nats: float
    sets: int
    best: bool
    tokens: int = 0
    rows: int = 0


def search_order(costs: Costs, size: int, beam: int) -> FixedOrder:
    """Return the order of least cost that a beam search over sets of places meets.

    The sets of the order from left to right are always kept: no result costs more than that order.

    Args:
        costs: nats of every place given a set of revealed ones.
        size: places.
        beam: sets of each size that are kept.
    """
    level: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {frozenset(): (0.0, ())}
    sets, best = 0, True
    for turn in range(size):
        following: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        for revealed, (nats, order) in level.items():
            each = costs(order)
            for place in set(range(size)) - revealed:
                reached = (nats + each[place], (*order, place))
                known = following.setdefault(revealed | {place}, reached)
                following[revealed | {place}] = min(known, reached)
        sets += len(level)
        best = best and len(following) <= beam
        first = frozenset(range(turn + 1))
        kept = sorted(following.items(), key=lambda entry: entry[1])[:beam]
        level = dict(kept) | {first: following[first]}
    ((nats, order),) = level.values()
    return FixedOrder(order, nats, sets, best)


def find_order(
    denoiser: Denoiser, family: Family, windows: Windows, *, beam: int, batch_tokens: int = 8192
) -> FixedOrder:
    """Return the best order found for writing texts, one token per call and without controls.

    Report its likelihood on other texts: on these it is too good by the choice.

    Args:
        denoiser: the network, in the mode and dtype it is to be evaluated in.
        family: its process, schedule, objective and block size.
        windows: the texts to search on.
        beam: sets of each size that are kept.
        batch_tokens: tokens per network call.

    Raises:
        ConfigError: noise under which a rule cannot follow a fixed order, or nothing to keep.
    """
    if beam < 1:
        raise ConfigError(f"beam {beam}: give at least 1", code="beam_out_of_range")
    policy = build_estimator("policy", rule="confidence", knobs={"order": "position"})
    windows = with_rest(windows, family, denoiser.context)
    policy.check(denoiser, family, windows)
    scorer = Scorer(denoiser, family, batch_tokens)
    draws = ReplicateDraws(scorer, windows, policy, 0, EstimateOptions(batch_tokens=batch_tokens))
    batches = list(draws.batches_of(0))
    size = max(batch.blocks.size for batch in batches)
    chosen = search_order(partial(_costs, batches, scorer, size), size, beam)
    tokens = int(windows.document_tokens.sum())
    return replace(chosen, tokens=tokens, rows=scorer.rows)


def _costs(
    batches: list[WindowBatch], scorer: Scorer, size: int, revealed: tuple[int, ...]
) -> list[float]:
    """Return the nats of all tokens at each place, given those at revealed places of the block."""
    total = torch.zeros(size, dtype=torch.float64)
    for batch in batches:
        place = torch.arange(batch.x0.shape[1]) % size  # [L]
        visible = torch.isin(place, torch.tensor(revealed, dtype=torch.int64))  # [L]
        noise = _noise(batch, batch.scorable & ~visible)
        nats = scorer.nats(batch.x0, noise, batch.real, likelihood)  # [B, L]
        total.index_add_(0, place, nats.sum(0))
    costs: list[float] = total.tolist()
    return costs


def _noise(batch: WindowBatch, masked: Tensor) -> Noise:
    """Return noise that masks the positions masked [B, L] and no others.

    The noise level is the one that decoding rules give to networks (`unmasking.time_left`).
    """
    left = batch.blocks.split(masked, False).sum(-1)  # [B, blocks]
    alpha = 1.0 - left.to(torch.float64) / (batch.sizes + 1.0)
    u = torch.where(masked, 0.0, NEVER).to(torch.float64)
    return Noise(batch.blocks.spread(alpha), torch.full_like(u, 0.5), u, torch.ones_like(u))
