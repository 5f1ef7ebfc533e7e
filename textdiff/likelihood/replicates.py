"""Streams of replicates, and `estimate`, which draws as many as a bound takes.

A replicate is one complete, randomised stratification of every window. Replicates are independent,
so the error comes from their means. Noise depends on (seed, document, replicate, window, position)
alone: not on the batch size, and two models are compared under common random numbers.

`ReplicateDraws` makes replicates by their numbers. Around it are a sum over processes (`map(reduce,
...)`), what is saved (`stopping.SavedReplicates`) and how many are needed (`stopping.Stopping`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import count
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.errors import ConfigError
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import build_estimator, default_estimator
from textdiff.likelihood.estimators.estimator import Estimator, WindowBatch
from textdiff.likelihood.scorer import Scorer, refuse_infinite
from textdiff.likelihood.stopping import (
    PILOT,
    EstimateOptions,
    SavedReplicates,
    Stopping,
    document_draws,
    model_digest,
)
from textdiff.likelihood.windows import Windows, with_rest
from textdiff.models import Denoiser

END = "end_of_text"
"""The part of a bound that belongs to documents' ends."""

Parts = dict[str, Tensor]


def estimate(
    denoiser: Denoiser,
    family: Family,
    windows: Windows,
    *,
    estimator: str | None = None,
    seed: int,
    **options: Any,
) -> Estimates:
    """Estimate the negative ELBO, or the likelihood, of windows.

    Args:
        denoiser: the network, in the mode and dtype it is to be evaluated in.
        family: its process, schedule, objective and block size.
        windows: what to score.
        estimator: a name in `ESTIMATORS`; None: `masked_count`, or `finite_t` for models in steps.
        seed: seed of the noise.
        **options: fields of `EstimateOptions`, and the estimator's own, such as `samples`.

    Raises:
        ConfigError: an estimator that does not exist or cannot score this model, wrong options.
        CheckpointError: `state` is of another job, or the network's output is not finite.
    """
    own = {f.name: options.pop(f.name) for f in fields(EstimateOptions) if f.name in options}
    run = EstimateOptions(**own)
    chosen = build_estimator(estimator or default_estimator(family), **options)
    windows = with_rest(windows, family, denoiser.context)
    _check(chosen, denoiser, family, windows, run.attribute)
    scorer = Scorer(denoiser, family, run.batch_tokens, run.preparer)
    draws = ReplicateDraws(scorer, windows, chosen, seed, run)
    saved = SavedReplicates.open(run.state, draws.fingerprint if run.state else {}, draws.split)
    saved.writes = run.shard[0] == 0
    stopping = Stopping.of(windows, family, chosen, run)
    pilot, shares = _draw(draws, saved, stopping, run.reduce)
    return draws.estimates(shares, pilot, saved.tokens, stopping.least)


def _draw(
    draws: "ReplicateDraws",
    saved: SavedReplicates,
    stopping: Stopping,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the nats of a precision's pilot [P, W] and of the counted replicates [R, parts, W]."""

    def stream(first: int) -> Iterator[Tensor]:
        return map(reduce, map(draws, count(first)))

    planned, size, start = stopping.planned, stopping.pilot, draws.run.first
    draws.done, draws.planned = len(saved.pilot), size + planned
    pilot = saved.take_pilot(stream(PILOT + len(saved.pilot)), size)
    if size:
        planned = stopping.after(pilot, draws.windows)
    draws.done, draws.planned = size + len(saved.shares), size + planned
    return pilot, saved.take(stream(start + len(saved.shares)), planned)


def by_document(nats: Tensor, windows: Windows) -> Tensor:
    """Return the nats of documents [R, parts, D] from those of their windows [R, parts, W]."""
    total = nats.new_zeros(*nats.shape[:2], len(windows.document_tokens))
    return total.index_add(2, windows.document, nats)


@dataclass
class ReplicateDraws:
    """Replicates by their numbers, scored by an estimator on this process's windows.

    Attributes:
        scorer: the network.
        windows: all windows.
        estimator: scores them.
        seed: seed of the noise.
        run: batches, shard and whether nats of tokens are kept.
        done: replicates that are done, for progress.
        planned: replicates in all, for progress.
    """

    scorer: Scorer
    windows: Windows
    estimator: Estimator
    seed: int
    run: EstimateOptions
    done: int = 0
    planned: int = 0
    _learned: list[Tensor | None] = field(default_factory=list)
    _allocations: list[Tensor | None] = field(default_factory=list)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the bound, that of documents' ends included."""
        ends = self.windows.ends is not None and self.estimator.attributes
        return (*self.estimator.parts, *([END] if ends else []))

    @cached_property
    def batches(self) -> list[list[int]]:
        """Windows of this process, those of similar length together."""
        lengths, (rank, processes) = self.windows.lengths.tolist(), self.run.shard
        order = sorted(range(len(lengths)), key=lambda w: (-lengths[w], w))[rank::processes]
        batches: list[list[int]] = []
        start = 0
        while start < len(order):
            size = max(1, self.run.batch_tokens // lengths[order[start]])
            batches.append(order[start : start + size])
            start += size
        return batches

    @cached_property
    def _starts(self) -> Tensor:
        """[W + 1] where the tokens of each window begin among those of all."""
        return torch.tensor([0, *map(len, self.windows.tokens)]).cumsum(0)

    def __call__(self, index: int) -> Tensor:
        """Return the nats of one replicate, flat: [parts, W], then [T] if tokens are kept."""
        if not self._learned:
            self._learned = [self.estimator.learn(b, self.scorer) for b in self.batches_of(-1)]
            self._allocations = [
                self.estimator.allocate(b, self.scorer) for b in self.batches_of(-2)
            ]
        count = len(self.windows.tokens)
        nats = torch.zeros(len(self.parts), count, dtype=torch.float64)
        tokens = torch.zeros(int(self._starts[-1]) * self.run.attribute, dtype=torch.float64)
        scored = 0
        for batch in self.batches_of(index):
            parts = self.estimator.score(batch, self.scorer)
            refuse_infinite(parts, batch, self.estimator, self.scorer)
            if self.run.attribute:
                at = self._starts[batch.window][:, None] + torch.arange(batch.x0.shape[1])
                every = torch.stack(list(parts.values())).sum(0)
                tokens[at[batch.scorable]] = every[batch.scorable]
            if END in self.parts:
                parts = self._with_end(parts, batch)
            for row, name in zip(nats, self.parts, strict=True):
                row[batch.window] = parts[name].sum(1)
            scored += len(batch.window) * self.run.shard[1]
            self.run.progress(self.done * count + scored, self.planned * count)
        self.done += 1
        return torch.cat([nats.flatten(), tokens])

    def split(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the [parts, W] nats and [T or 0] nats per token of a flat replicate."""
        count = len(self.windows.tokens)
        nats, tokens = share.tensor_split([len(self.parts) * count])
        return nats.view(-1, count), tokens

    def estimates(self, shares: Tensor, pilot: Tensor, tokens: Tensor, least: int) -> Estimates:
        """Return estimates from all replicates.

        Args:
            shares: [R, parts, W] nats.
            pilot: [P, W] nats of a precision's pilot.
            tokens: [T or 0] nats per token.
            least: replicates that Student's t needs.
        """
        family, parts = self.scorer.on_cpu, by_document(shares, self.windows).unbind(1)
        heavy = family.objective.heavy_tailed
        return Estimates(
            dict(zip(self.parts, parts, strict=True)),
            self.windows,
            estimator=self.estimator.kind,
            exact=self.estimator.exact,
            note=self.estimator.missing(family),
            least=least,
            pilot=pilot.sum(1),
            spread=shares.sum(1),
            pilot_spread=pilot,
            draws=document_draws(self.windows, family, self.estimator.draws),
            guess=math.log(family.process.vocabulary.count) if heavy else 0.0,
            tokens=tokens,
            rows=self.scorer.rows,
            calls=self._calls(),
        )

    def _calls(self) -> int:
        """Return the network calls of single rows that a rule takes, those of all processes."""
        if not self.estimator.writes:
            return 0
        return int(self.run.reduce(torch.tensor([self.scorer.calls], dtype=torch.float64)))

    @property
    def fingerprint(self) -> dict[str, str]:
        """Properties of this job that a saved state must share."""
        return {
            "model": model_digest(self.scorer.denoiser, self.scorer.on_cpu),
            "text": self.windows.digest,
            "layout": "nats of every window",
            "estimator": f"{self.estimator!r}, tokens {self.run.attribute}",
            "rest of the last block": str(self.windows.rest is not None),
            "seed": str(self.seed),
        }

    def batches_of(self, replicate: int) -> Iterator[WindowBatch]:
        """Yield this process's windows with the random numbers of a replicate."""
        windows, family = self.windows, self.scorer.on_cpu
        v = self.estimator.strata(windows, family, self.seed, replicate)  # [W, S, blocks]
        for number, which in enumerate(self.batches):
            at, pad = torch.tensor(which), family.process.vocabulary.mask_token_id
            x0, real, scored = windows.batch(which, pad)
            yield WindowBatch(
                family=family,
                seed=self.seed,
                replicate=replicate,
                window=at,
                document=windows.document[at],
                index=windows.index[at],
                noise_key=windows.noise_keys[at],
                origin=windows.origins[at],
                x0=x0,
                real=real,
                scorable=scored,
                v=v[at][:, :, : family.blocks(x0.shape[1]).count],
                learned=self._learned[number] if self._learned else None,
                allocation=self._allocations[number] if self._allocations else None,
            )

    def _with_end(self, parts: Parts, batch: WindowBatch) -> Parts:
        """Return the parts, with what end-of-text tokens contribute in a part of its own."""
        ends = cast("Tensor", self.windows.ends)[batch.window][:, None]
        is_end = (ends >= 0) & (torch.arange(batch.x0.shape[1]) >= ends)  # and their fill
        text = {name: nats.masked_fill(is_end, 0.0) for name, nats in parts.items()}
        return text | {END: sum(parts.values(), torch.zeros(())) * is_end}


def _check(
    estimator: Estimator,
    denoiser: Denoiser,
    family: Family,
    windows: Windows,
    attribute: bool,
) -> None:
    """Refuse what an estimator cannot score, and context that would have to be predicted from."""
    estimator.check(denoiser, family, windows)
    if attribute and not estimator.attributes:
        raise ConfigError(
            f"estimator {estimator.kind} weighs whole orders: it has no nats per token",
            code="no_token_nats",
        )
    if windows.scored is None or family.block_size is None:
        return
    rows = zip(windows.tokens, windows.scored, windows.document.tolist(), strict=True)
    for tokens, scored, document in rows:
        scored = scored if windows.unknown is None else scored | (tokens == windows.unknown)
        block = np.arange(len(scored)) // family.block_size
        if not scored.all() and block[~scored].max() > block[scored].min():
            raise ConfigError(
                f"document {document + 1}: a model in blocks of {family.block_size} cannot use "
                "fixed text that comes in a later block than text to be scored; use a model of one "
                "block, or fix only text that comes before",
                code="context_in_later_block",
            )
