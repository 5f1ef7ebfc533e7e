"""The difference of two models' bounds on one text, with its error."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.errors import DataError
from textdiff.likelihood.bound import MANY_DRAWS, Tail, WithError, mean_skewness
from textdiff.likelihood.estimates import Estimates, standard_error, text_error


@dataclass(frozen=True)
class Difference(WithError):
    """The first model's bound minus the second's; below zero the first is better.

    Attributes:
        mean: the difference, in `unit`.
        stderr: its Monte-Carlo standard error for this text.
        text_stderr: its standard error over documents as a sample; None for one document.
        replicates: pairs of replicates that `stderr` comes from.
        unit: `nats/token`, or `bits/byte` where tokens differ.
        tokens: tokens of the first model that it is of.
        documents: documents that it is of.
        left_out: documents that the tokens of either model do not give back: in bits per byte they
            do not compare.
        skewness: of `mean` as an estimate; its interval reaches further on that side.
        doubt: why neither `stderr` nor an interval can be trusted, and what to do; empty if they
            can.
    """

    mean: float
    stderr: float
    text_stderr: float | None
    replicates: int
    unit: str
    tokens: int = 0
    documents: int = 1
    left_out: int = 0
    skewness: float = 0.0
    doubt: str = ""


def paired(
    first: Callable[[int], Estimates], second: Callable[[int], Estimates], replicates: int
) -> tuple[Estimates, Estimates]:
    """Return estimates of two models, with the replicates that either of them needs.

    They need different numbers where they draw noise differently often: a short text in blocks, or
    in smaller windows.

    Args:
        first: estimates by the first model, in a given number of replicates at least.
        second: likewise by the second.
        replicates: the least number of them.
    """
    a = first(replicates)
    b = second(max(replicates, a.least))
    return (a if a.exact or a.replicates >= b.least else first(b.least)), b


def compare_models(
    first: Callable[[int], Estimates], second: Callable[[int], Estimates], replicates: int
) -> tuple[Difference, tuple[Estimates, Estimates]]:
    """Return the difference of two models on one text, per byte where tokens differ, and its pair.

    Args:
        first: see `paired`.
        second: see `paired`.
        replicates: see `paired`.
    """
    a, b = paired(first, second, replicates)
    return compare(a, b, per_byte=a.windows.digest != b.windows.digest), (a, b)


def compare(a: Estimates, b: Estimates, *, per_byte: bool = False) -> Difference:
    """Return the difference of two estimates of one text, from those of their replicates.

    Estimates of one seed and estimator have the same noise, so most of the Monte-Carlo error
    cancels.

    Args:
        a: estimates of the first model.
        b: estimates of the second.
        per_byte: compare in bits per byte, which different tokenizers have in common. Documents
            that the tokens of either model do not give back are left out.

    Raises:
        DataError: they are of different texts, or of different tokens and not compared per byte, or
            no document is left, or one has probability 0.
    """
    _refuse_different(a, b, per_byte)
    kept = _comparable(a, b) if per_byte else torch.ones(a.nats.shape[1], dtype=torch.bool)
    size = (a.windows.document_bytes if per_byte else a.windows.document_tokens)[kept]
    scale = math.log(2.0) if per_byte else 1.0
    first, second = _aligned(a.nats, b.nats)
    difference = ((first - second) / scale)[:, kept]  # [R, D]
    _refuse_impossible(difference)
    totals = difference.sum(1) / size.sum()
    exact = a.exact and b.exact
    skewness, doubt = (0.0, "") if exact else _tail(a, b, difference)
    return Difference(
        mean=float(totals.mean()),
        stderr=0.0 if exact else standard_error(totals),
        text_stderr=text_error(difference.mean(0), size),
        replicates=len(totals),
        unit="bits/byte" if per_byte else "nats/token",
        tokens=int(a.windows.document_tokens[kept].sum()),
        documents=len(size),
        left_out=len(kept) - len(size),
        skewness=skewness,
        doubt=doubt,
    )


def _refuse_different(a: Estimates, b: Estimates, per_byte: bool) -> None:
    """Refuse estimates of different texts, and of different tokens if not compared per byte."""
    if a.windows.digest == b.windows.digest:
        return
    if not a.windows.text_digest or a.windows.text_digest != b.windows.text_digest:
        raise DataError(
            "the two estimates are of different texts, so they do not compare; score one text",
            code="different_texts",
        )
    if not per_byte:
        raise DataError(
            "the two estimates are of one text in different tokens or windows, so nats per token "
            "do not compare; compare in bits per byte (per_byte=True)",
            code="different_tokens",
        )


def _refuse_impossible(difference: Tensor) -> None:
    """Refuse documents that one of two decoding rules never writes, [R, D]."""
    impossible = int((~difference.isfinite()).any(0).sum())
    if impossible:
        raise DataError(
            f"{impossible} document(s) have probability 0 under the decoding rule, so their "
            "nats have no difference; leave truncation (top_k, top_p, min_p) and temperature 0 "
            "out",
            code="impossible_text",
        )


def _comparable(a: Estimates, b: Estimates) -> Tensor:
    """Return which documents the tokens of both models give back, [D] bool.

    Raises:
        DataError: there are none with a byte.
    """
    kept = torch.ones(a.nats.shape[1], dtype=torch.bool)
    losses = {**b.losses(), **a.losses()}
    kept[list(losses)] = False
    if losses and not int(a.windows.document_bytes[kept].sum()):
        document, loss = next(iter(losses.items()))
        raise DataError(
            f"the tokens of one of the models do not give any document back (in document "
            f"{document + 1} {loss}), so bits per byte do not compare; compare models with one "
            "tokenizer, or of tokenizers that lose nothing",
            code="every_document_lossy",
        )
    return kept


def _tail(a: Estimates, b: Estimates, difference: Tensor) -> tuple[float, str]:
    """Return the skewness of a difference [R, D], and what puts its error in doubt.

    What puts either bound in doubt does so for the difference, whose own draws may also have tails
    that neither bound's have: where the models agree on everything else.
    """
    cells, others = a.cells(), b.cells()
    whole = difference.shape[1] == a.nats.shape[1]  # no document is left out
    if whole and cells.shape[1] == others.shape[1]:
        cells, others = _aligned(cells, others)
        cells = cells - others
    else:
        cells = difference
    tails = a.tail(), b.tail(), Tail(mean_skewness(cells), MANY_DRAWS, len(cells))
    return tails[-1].skewness, next((tail.doubt for tail in tails if tail.doubt), "")


def _aligned(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return as many replicates of one as of the other; a single exact one stands for all."""
    count = max(len(a), len(b)) if 1 in (len(a), len(b)) else min(len(a), len(b))
    return torch.broadcast_to(a[:count], (count, a.shape[1])), torch.broadcast_to(
        b[:count], (count, b.shape[1])
    )
