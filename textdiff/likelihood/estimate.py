"""Estimates in replicates: how many, of what, and over which processes.

A replicate is one complete, randomised stratification of every window. Replicates are independent,
so the error comes from their means. Noise depends on (seed, document, replicate, window, position)
alone: not on the batch size, and two models are compared under common random numbers.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError, ConfigError, overflow_advice
from textdiff.likelihood.endings import with_rest
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import Estimator, build_estimator, default_estimator
from textdiff.likelihood.estimators.estimator import Parts
from textdiff.likelihood.estimators.window_batch import WindowBatch
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.state import State, model_digest
from textdiff.likelihood.stopping import (
    LEAST_PILOT,
    MIN_REPLICATES,
    PILOT,
    document_draws,
    least_replicates,
    replicates_for,
)
from textdiff.likelihood.windows import Windows
from textdiff.models import TextDiffusionModel

END = "end_of_text"
"""The part of a bound that documents' ends cost."""


def estimate(
    denoiser: TextDiffusionModel,
    family: Family,
    windows: Windows,
    *,
    estimator: str | None = None,
    seed: int,
    replicates: int = MIN_REPLICATES,
    precision: float | None = None,
    each_document: bool = False,
    attribute: bool = False,
    batch_tokens: int = 8192,
    state: Path | None = None,
    shard: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda nats: nats,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Estimates:
    """Estimates the negative ELBO, or the likelihood, of windows.

    Args:
        denoiser: the network, in the mode and dtype it is to be evaluated in.
        family: its process, schedule, objective and block size.
        windows: what to score.
        estimator: a name in `ESTIMATORS`; None: `masked_count`, or `finite_t` for models in steps.
        seed: seed of the noise.
        replicates: independent replicates; at least 8, and as many as draw noise 64 times in all
            (32 for one window of one block under the default). Exact estimators take one.
        precision: takes as many replicates as it takes for the 95 % interval of the perplexity to
            be within this fraction of it on either side; at least `replicates`, at most 4096. A
            pilot with noise of its own says how many, and the interval is of its spread.
        each_document: whether every document draws noise 64 times, so that its own interval is
            right too.
        attribute: whether to keep the nats of every token.
        batch_tokens: tokens per network call; results do not depend on it beyond rounding.
        state: a file that every replicate is saved to, and that an interrupted job continues from.
        shard: (rank, processes): this process scores every `processes`-th window.
        reduce: adds nats over processes.
        progress: told (windows done, windows planned) after each call.
        **options: the estimator's own, such as `samples`, `eps`, `orders` or `timesteps`.

    Raises:
        ConfigError: an estimator that does not exist or cannot score this model, wrong options.
        CheckpointError: `state` is of another job, or the network's output is not finite.
    """
    if precision is not None and not 0.0 < precision < math.inf:
        raise ConfigError(f"precision {precision}: give a share above 0, such as 0.005")
    name = estimator or default_estimator(family)
    chosen = build_estimator(name, **options)
    windows = with_rest(windows, family, int(denoiser.config.max_position_embeddings))
    chosen.check(denoiser, family, windows)
    _refuse_unseen_context(windows, family)
    if attribute and not chosen.attributes:
        raise ConfigError(f"estimator {name} weighs whole orders: it has no nats per token")
    job = _Job(denoiser, family, windows, chosen, seed, batch_tokens, shard, attribute)
    saved = State.open(state, job.fingerprint() if state else {}, shard[0] == 0)
    least = 1 if chosen.exact else least_replicates(windows, family, chosen.draws, each_document)
    wanted = 1 if chosen.exact else max(replicates, least)
    pilot = torch.zeros(0, len(windows.tokens), dtype=torch.float64)
    if precision is not None and not chosen.exact:
        pilot = _pilot(job, saved, max(wanted, LEAST_PILOT), wanted, reduce, progress)
        per_token = pilot.sum(1) / windows.document_tokens.sum().clamp(min=1)
        wanted = max(wanted, replicates_for(precision, per_token))
    while (done := len(saved.shares)) < wanted:
        before = len(pilot)
        told = _counting_on(progress, before + done, before + wanted, len(windows.tokens))
        saved.add(*job.split(reduce(job.replicate(done, told))))
    shares = torch.stack(saved.shares)  # [R, P, W]
    parts = by_document(shares, windows).unbind(1)
    heavy = family.objective.heavy_tailed
    return Estimates(
        dict(zip(job.parts, parts, strict=True)),
        windows,
        estimator=name,
        exact=chosen.exact,
        note=chosen.missing(family),
        least=least,
        pilot=pilot.sum(1),
        spread=shares.sum(1),
        pilot_spread=pilot,
        draws=document_draws(windows, family, chosen.draws),
        guess=math.log(family.process.vocabulary.count) if heavy else 0.0,
        tokens=saved.tokens,
        rows=job.scorer.rows,
    )


def by_document(nats: Tensor, windows: Windows) -> Tensor:
    """[R, P, D] nats of documents from those of their windows, [R, P, W]."""
    found = nats.new_zeros(*nats.shape[:2], len(windows.document_tokens))
    return found.index_add(2, windows.document, nats)


class _Job:
    """The windows of one process in batches, and what an estimator has learned about them."""

    def __init__(
        self,
        denoiser: TextDiffusionModel,
        family: Family,
        windows: Windows,
        estimator: Estimator,
        seed: int,
        batch_tokens: int,
        shard: tuple[int, int],
        attribute: bool,
    ):
        self.scorer = Scorer(denoiser, family, batch_tokens)
        self.windows = windows
        self.estimator = estimator
        self.parts = estimator.parts
        if windows.ends is not None and estimator.attributes:
            self.parts = (*self.parts, END)
        self.seed = seed
        self.batches = _batches(windows, batch_tokens, shard)
        self.processes = shard[1]
        self.attribute = attribute
        self.learned: list[Tensor | None] | None = None
        self.allocations: list[Tensor | None] | None = None
        lengths = torch.tensor([len(tokens) for tokens in windows.tokens])
        self.starts = lengths.cumsum(0) - lengths
        self._kept = int(lengths.sum()) if attribute else 0

    def replicate(self, index: int, progress: Callable[[int], None]) -> Tensor:
        """Nats of one replicate, flat: [P, W], then [T] if tokens are attributed."""
        if self.learned is None:
            batches = self._views(-1)
            self.learned = [self.estimator.learn(batch, self.scorer) for batch in batches]
            batches = self._views(-2)
            self.allocations = [self.estimator.allocate(batch, self.scorer) for batch in batches]
        nats = torch.zeros(len(self.parts), len(self.windows.tokens), dtype=torch.float64)
        tokens = torch.zeros(self._kept, dtype=torch.float64)
        done = 0
        for batch in self._views(index):
            parts = self.estimator.score(batch, self.scorer)
            _refuse_infinite(parts, batch, getattr(self.scorer.denoiser, "dtype", None))
            if self.attribute:
                at = self.starts[batch.window][:, None] + torch.arange(batch.x0.shape[1])
                every = torch.stack(list(parts.values())).sum(0)
                tokens[at[batch.scorable]] = every[batch.scorable]
            if END in self.parts:
                parts = self._with_end(parts, batch)
            for row, name in zip(nats, self.parts, strict=True):
                row[batch.window] = parts[name].sum(1)
            done += len(batch.window)
            progress(done * self.processes)
        return torch.cat([nats.flatten(), tokens])

    def _with_end(self, parts: Parts, batch: WindowBatch) -> Parts:
        """The parts, with what end-of-text tokens cost in a part of its own."""
        assert self.windows.ends is not None
        is_end = torch.arange(batch.x0.shape[1]) == self.windows.ends[batch.window][:, None]
        text = {name: nats.masked_fill(is_end, 0.0) for name, nats in parts.items()}
        return text | {END: sum(parts.values(), torch.zeros(())) * is_end}

    def split(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """[P, W] nats and [T or 0] nats per token of a flat share."""
        nats, tokens = torch.split(share, [len(share) - self._kept, self._kept])
        return nats.view(-1, len(self.windows.tokens)), tokens

    def fingerprint(self) -> dict[str, str]:
        """What makes a saved state one of this job."""
        return {
            "model": model_digest(self.scorer.denoiser, self.scorer.host),
            "text": self.windows.digest,
            "layout": "nats of every window",
            "estimator": f"{self.estimator!r}, tokens {self.attribute}",
            "rest of the last block": str(self.windows.rest is not None),
            "seed": str(self.seed),
        }

    def _views(self, replicate: int) -> Iterator[WindowBatch]:
        windows, family = self.windows, self.scorer.host
        v = self.estimator.strata(windows, family, self.seed, replicate)
        for number, which in enumerate(self.batches):
            x0, real, scored = windows.batch(which, family.process.vocabulary.mask_token_id)
            at = torch.tensor(which)
            yield WindowBatch(
                family=family,
                seed=self.seed,
                replicate=replicate,
                window=at,
                document=windows.document[at],
                index=windows.index[at],
                x0=x0,
                real=real,
                scorable=scored,
                v=v[at][:, :, : family.blocks(x0.shape[1]).count],
                learned=self.learned[number] if self.learned else None,
                allocation=self.allocations[number] if self.allocations else None,
            )


def _refuse_unseen_context(windows: Windows, family: Family) -> None:
    """Refuses context that blocks before it are to be predicted from."""
    if windows.scored is None or family.block_size is None:
        return
    rows = zip(windows.tokens, windows.scored, windows.document.tolist(), strict=True)
    for tokens, scored, document in rows:
        scored = scored if windows.unknown is None else scored | (tokens == windows.unknown)
        block = np.arange(len(scored)) // family.block_size
        if not scored.all() and block[~scored].max() > block[scored].min():
            raise ConfigError(
                f"document {document + 1}: a model in blocks of {family.block_size} cannot see "
                "given text that comes in a later block than text to be scored; use a model of one "
                "block, or give only text that comes before"
            )


def _refuse_infinite(parts: Parts, batch: WindowBatch, dtype: object) -> None:
    """Refuse nats that are not finite."""
    for nats in parts.values():
        bad = ~torch.isfinite(nats)
        if bool(bad.any()):
            row, column = bad.nonzero()[0].tolist()
            cost = float(nats[row, column])
            more = ", more than a float holds" if cost == math.inf else ""
            raise CheckpointError(
                f"document {int(batch.document[row]) + 1}, window {int(batch.index[row]) + 1}: the "
                f"network's output costs {cost} nats at token {column + 1}{more}; "
                + overflow_advice(dtype)
            )


def _pilot(
    job: _Job,
    saved: State,
    size: int,
    following: int,
    reduce: Callable[[Tensor], Tensor],
    progress: Callable[[int, int], None],
) -> Tensor:
    """[size, W] nats of a precision's pilot, of which what is missing is drawn.

    At least `following` replicates come after it.
    """
    while (done := len(saved.pilot)) < size:
        told = _counting_on(progress, done, size + following, len(job.windows.tokens))
        nats, _ = job.split(reduce(job.replicate(PILOT + done, told)))
        saved.add_pilot(nats.sum(0))
    return torch.stack(saved.pilot[:size])


def _counting_on(
    progress: Callable[[int, int], None], replicate: int, planned: int, windows: int
) -> Callable[[int], None]:
    """Tells `progress` the windows done in one replicate on top of those before it."""
    return lambda done: progress(replicate * windows + done, planned * windows)


def _batches(windows: Windows, batch_tokens: int, shard: tuple[int, int]) -> list[list[int]]:
    """Windows of like length together, about `batch_tokens` tokens each."""
    lengths = windows.lengths.tolist()
    order = sorted(range(len(lengths)), key=lambda w: (-lengths[w], w))[shard[0] :: shard[1]]
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        batches.append(order[start : start + size])
        start += size
    return batches
