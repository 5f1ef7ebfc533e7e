"""Which of two models a text prefers, and how sure that is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.errors import DataError
from textdiff.likelihood.bound import student_t_quantile
from textdiff.likelihood.estimates import Estimates, standard_error, text_error


@dataclass(frozen=True)
class Difference:
    """The first model's bound minus the second's; below zero the first is better.

    Attributes:
        mean: the difference, in `unit`.
        stderr: its Monte-Carlo standard error, the text being given.
        text_stderr: its standard error over documents as a sample; None for one document.
        replicates: pairs of replicates that `stderr` comes from.
        unit: `nats/token`, or `bits/byte` where tokens differ.
    """

    mean: float
    stderr: float
    text_stderr: float | None
    replicates: int
    unit: str

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student-t interval of `mean`, Monte-Carlo error only."""
        if self.stderr == 0.0:
            return self.mean, self.mean
        width = student_t_quantile(0.5 + confidence / 2, self.replicates - 1) * self.stderr
        return self.mean - width, self.mean + width


def paired(
    first: Callable[[int], Estimates], second: Callable[[int], Estimates], replicates: int
) -> tuple[Estimates, Estimates]:
    """Estimates of two models, with the replicates that either of them needs.

    They need different numbers where they draw noise differently often: a short text in blocks, or
    in smaller windows.

    Args:
        first: estimates by the first model, in a given number of replicates at least.
        second: likewise by the second.
        replicates: how many were asked for.
    """
    a = first(replicates)
    b = second(max(replicates, a.least))
    return (a if a.exact or a.replicates >= b.least else first(b.least)), b


def compare(a: Estimates, b: Estimates, *, per_byte: bool = False) -> Difference:
    """The difference of two estimates of one text, from the differences of their replicates.

    Estimates of one seed and estimator have the same noise, so most of the Monte-Carlo error
    cancels.

    Args:
        a: estimates of the first model.
        b: estimates of the second.
        per_byte: compare in bits per byte, which different tokenizers have in common.

    Raises:
        DataError: they are of different texts, or of different tokens and not compared per byte.
    """
    same = a.windows.digest == b.windows.digest
    if not same and not _same_text(a, b):
        raise DataError(
            "the two estimates are of different texts, so their difference says nothing"
        )
    if not same and not per_byte:
        raise DataError(
            "the two estimates are of one text in different tokens or windows, so nats per token "
            "do not compare; compare in bits per byte (per_byte=True)"
        )
    size = a.windows.document_bytes if per_byte else a.windows.document_tokens
    scale = math.log(2.0) if per_byte else 1.0
    first, second = _aligned(a.nats, b.nats)
    difference = (first - second) / scale  # [R, D]
    totals = difference.sum(1) / size.sum()
    return Difference(
        mean=float(totals.mean()),
        stderr=0.0 if a.exact and b.exact else standard_error(totals),
        text_stderr=text_error(difference.mean(0), size),
        replicates=len(totals),
        unit="bits/byte" if per_byte else "nats/token",
    )


def _same_text(a: Estimates, b: Estimates) -> bool:
    known = bool(a.windows.text_digest)
    return known and a.windows.text_digest == b.windows.text_digest


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """As many replicates of one as of the other; a single exact one stands for all."""
    count = max(len(a), len(b)) if 1 in (len(a), len(b)) else min(len(a), len(b))
    return torch.broadcast_to(a[:count], (count, a.shape[1])), torch.broadcast_to(
        b[:count], (count, b.shape[1])
    )
