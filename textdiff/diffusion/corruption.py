"""Corrupted batches: what noise makes of clean tokens, and which positions contribute.

Letters: B rows, L positions, N positions that contribute to the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise, NoiseUniforms


@dataclass(frozen=True)
class FirstPass:
    """Rows whose network reads its own first prediction of them, made from the same noisy tokens.

    Attributes:
        rows: [R] the rows that the first pass runs on, never none.
        at: [M] flat indices into B * L of the positions that it predicts.
        positions: [M] the same, as indices into R * L.
        noise: the noise at those positions, [M] each.
        count: as in `Batch`, of these positions.
    """

    rows: Tensor
    at: Tensor
    positions: Tensor
    noise: Noise
    count: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "FirstPass":
        """Apply a function to every tensor."""
        rows, at, positions = map(function, (self.rows, self.at, self.positions))
        count = None if self.count is None else function(self.count)
        return FirstPass(rows, at, positions, self.noise.map(function), count)


@dataclass(frozen=True)
class _Movable:
    """Batch whose tensors, also those of its bundles, move together."""

    def to(self, device: torch.device) -> Self:
        """Copy the batch to a device; from pinned memory nothing waits."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Copy the batch to memory that a GPU reads by itself; data loaders call it."""
        return self.map(lambda x: x.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = function(value)
            elif isinstance(value, Noise | NoiseUniforms | FirstPass):
                changed[field.name] = value.map(function)
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch(_Movable):
    """A corrupted batch of B rows.

    Attributes:
        x0: [B, L] int64 clean tokens.
        xt: [B, L] int64 noisy tokens.
        positions: [N] int64 flat indices of the positions that contribute to the loss.
        noise: the noise at those positions, [N] each.
        sigma: [B, blocks] total noise per block, or what else networks of the family read.
        document_ids: [B, L] (-1: padding), each one run of ids; None where attention ignores
            documents.
        block_size: tokens per block; None: the whole sequence.
        answers: [B, L] bool, tokens that are learned at all where others are given at every noise
            level; None: all of them.
        answer_tokens: tokens that the loss is shared among, where this is not all of them.
        first: the first pass of a network with self-conditioning; None: the network reads no
            earlier prediction.
        documents: documents and padding of all rows, at most; None: they were not counted.
        count: [] int64, how many of `positions` contribute, the first ones, where a device counted
            them and the CPU has not read their number; None: all of them.
    """

    x0: Tensor
    xt: Tensor
    positions: Tensor
    noise: Noise
    sigma: Tensor
    document_ids: Tensor | None
    block_size: int | None
    answers: Tensor | None = None
    answer_tokens: float | None = None
    first: FirstPass | None = None
    documents: int | None = None
    count: Tensor | None = None

    def counted(self, count: int) -> "Batch":
        """Return the batch with its first positions alone, as many as a device has counted."""
        noise = self.noise.map(lambda value: value[:count])
        return replace(self, positions=self.positions[:count], noise=noise, count=None)

    def self_conditioned(self, rows: Tensor | None = None, all_rows: bool = False) -> "Batch":
        """Return the batch with a first pass on the noisy tokens of some rows.

        Args:
            rows: ascending indices of the rows whose predictions the network reads, perhaps none;
                None: all of them.
            all_rows: whether the pass runs on every row, so that its shape is always the same. It
                runs on one at least: processes that share the weights of a network run in step.
        """
        length = self.x0.shape[1]
        every = torch.arange(len(self.x0), device=self.x0.device)
        rows = every if rows is None else rows
        reads = torch.zeros_like(every, dtype=torch.bool).index_fill(0, rows, True)  # [B]
        predicted = reads[self.positions // length]  # [N]
        if self.count is not None:
            predicted &= torch.arange(len(predicted), device=rows.device) < self.count
        index, count = flagged(predicted)  # [M]
        at = self.positions[index]
        rows = every if all_rows else rows if len(rows) else every[:1]  # [R]
        positions = torch.searchsorted(rows, at // length) * length + at % length
        # Of uncounted positions those that do not contribute may be in other rows.
        positions = positions.clamp(max=len(rows) * length - 1)
        noise = self.noise.map(lambda value: value[index])
        return replace(self, first=FirstPass(rows, at, positions, noise, count))

    def first_pass(self) -> "Batch":
        """Return the batch that the first pass runs on."""
        assert self.first is not None
        rows, ids = self.first.rows, self.document_ids
        return Batch(
            self.x0[rows],
            self.xt[rows],
            self.first.positions,
            self.first.noise,
            self.sigma[rows],
            None if ids is None else ids[rows],
            self.block_size,
            documents=self.documents,
            count=self.first.count,
        )


@dataclass(frozen=True)
class CleanBatch(_Movable):
    """A batch of B rows that is corrupted on the device, by a schedule that is being learned.

    Attributes:
        x0: [B, L] int64 clean tokens.
        uniforms: of 2 B rows: two masks of every row, at the same times.
        document_ids: [B, L], or None where attention ignores documents.
        block_size: tokens per block; None: the whole sequence.
        first_rows: [R] int64, rows with a first pass; None: the network reads no earlier
            prediction.
    """

    x0: Tensor
    uniforms: NoiseUniforms
    document_ids: Tensor | None
    block_size: int | None
    first_rows: Tensor | None = None


def flagged(flags: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the indices of flags [n] that are set, and how many of them there are; None: all.

    The CPU would wait for the number of those on another device. There all indices are returned,
    first those of flags that are set, in order.
    """
    if flags.device.type == "cpu":
        return flags.nonzero().squeeze(1), None
    return (~flags).to(torch.uint8).argsort(stable=True), flags.sum()


def corrupt(family: Family, x0: Tensor, noise: Noise, document_ids: Tensor | None) -> Batch:
    """Corrupt x0 [B, L] where its noise is: mostly on the CPU, which counts the positions.

    Elsewhere the batch has all positions, of which the first `count` contribute.
    """
    xt = family.process.corrupt(x0, noise)
    positions, count = flagged(family.objective.positions(noise).flatten())
    size = family.blocks(x0.shape[1]).size
    alpha = family.known_alpha(noise.alpha.expand(x0.shape)[:, ::size])
    sigma = family.network_time(alpha)  # [B, blocks]
    return Batch(
        x0, xt, positions, noise.at(positions), sigma, document_ids, family.block_size,
        documents=count_documents(document_ids), count=count,
    )  # fmt: skip


def count_documents(document_ids: Tensor | None) -> int | None:
    """Return the documents and padding of all rows of ids [B, L]; None: none, or not on the CPU."""
    if document_ids is None or document_ids.device.type != "cpu":
        return None  # the CPU would wait for another device
    return len(document_ids) + int((document_ids[:, 1:] != document_ids[:, :-1]).sum())


def log_mask(noise: Noise, exponent: Tensor) -> Tensor:
    """Return the log-probability of each position's mask bit, [B, L].

    A position is masked with probability threshold ** exponent.

    Args:
        noise: drawn by time.
        exponent: [B, L] rate exponents.
    """
    log_masked = exponent * noise.threshold.log()
    return torch.where(noise.corrupted, log_masked, torch.log(-torch.expm1(log_masked)))
