"""Nats per replicate and document, and the bounds that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from textdiff.data.losses import Loss
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.bound import MANY_DRAWS, Bound, Tail, mean_skewness
from textdiff.likelihood.windows import Windows


@dataclass(frozen=True)
class Estimates:
    """R replicates of the nats of D documents.

    Attributes:
        parts: [R, D] float64 nats of each part of the bound.
        windows: what they are of.
        estimator: name of the estimator.
        exact: whether it is without Monte-Carlo error.
        note: what keeps this from being a bound; empty if it is one.
        least: replicates that Student's t needs to be right about their mean.
        pilot: [P] float64 nats of all documents in further replicates, from which a precision was
            planned: the error of the whole is their spread, and they are in no other figure but
            `rows`. Empty: none was asked for.
        spread: [R, W] float64 nats of each window, whose tails say what an interval is worth;
            empty: those of documents do.
        pilot_spread: [P, W] likewise for the pilot.
        draws: [D] noise draws of each document per replicate; empty: not known.
        guess: nats per token of guessing at random, where an objective's costs have heavy tails;
            0: they have not.
        tokens: [T] float64 nats of every token of every window in turn, summed over replicates;
            empty unless asked for.
        rows: rows that this process ran the network on.
        calls: network calls of single rows that a decoding rule takes to write the texts; 0: the
            estimator is of no rule, or its nats were saved before.
    """

    parts: Mapping[str, Tensor]
    windows: Windows
    estimator: str = "masked_count"
    exact: bool = False
    note: str = ""
    least: int = 1
    pilot: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    spread: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    pilot_spread: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    guess: float = 0.0
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    rows: int = 0
    calls: int = 0

    @cached_property
    def nats(self) -> Tensor:
        """[R, D] nats, all parts together."""
        return torch.stack(list(self.parts.values())).sum(0)

    @property
    def calls_per_token(self) -> float | None:
        """Network calls of a row per token that a decoding rule writes; None: not counted."""
        return self.calls / int(self.windows.document_tokens.sum()) if self.calls else None

    @property
    def replicates(self) -> int:
        """R."""
        return len(self.nats)

    def bound(self) -> Bound:
        """Return the bound over all documents, empty ones with what their ends contribute.

        Raises:
            DataError: all of them are empty.
        """
        return self._of(slice(None), self.pilot)

    def document(self, index: int) -> Bound:
        """Return the bound of one document.

        Raises:
            DataError: the document has no token to share it among.
        """
        return self._of(slice(index, index + 1), torch.zeros(0))

    def token_nats(self) -> list[Tensor]:
        """Return the nats of every token, [length] float64 per window, averaged over replicates.

        Context that is not scored has 0. The sum over a document's windows is its nats.

        Raises:
            ConfigError: they were not asked for.
        """
        if not len(self.tokens):
            raise ConfigError(
                "nats per token were not collected; estimate with attribute=True",
                code="no_token_nats",
            )
        lengths = [len(tokens) for tokens in self.windows.tokens]
        return list(torch.split(self.tokens / self.replicates, lengths))

    def _of(self, which: slice, pilot: Tensor) -> Bound:
        tokens = self.windows.document_tokens[which]
        total = int(tokens.sum())
        if not total:
            raise DataError(self._nothing(which), code="no_token_to_score")
        terms = {"diffusion": 0.0, "reconstruction": 0.0, "prior": 0.0} | {
            name: float((nats[:, which].sum(1) / total).mean()) for name, nats in self.parts.items()
        }
        losses = self.losses(which)
        note = "; ".join(filter(None, [self.note, _lossy(losses, len(tokens))]))
        nats = self.nats[:, which]
        spread = pilot if len(pilot) else nats.sum(1)
        tail = self.tail(which, bool(len(pilot)))
        return Bound(
            mean=sum(terms.values()),
            stderr=0.0 if self.exact else standard_error(spread / total, self.replicates),
            text_stderr=text_error(nats.mean(0), tokens),
            tokens=total,
            bytes=int(self.windows.document_bytes[which].sum()),
            documents=len(tokens),
            estimator=self.estimator,
            replicates=self.replicates,
            terms=terms,
            is_bound=not note,
            note=note,
            pilot=len(pilot),
            # A pilot's spread is independent of the mean, whose own skewness then does not matter.
            skewness=0.0 if len(pilot) else tail.skewness,
            doubt=tail.doubt,
            lossy=len(losses),
            impossible=int((nats == math.inf).any(0).sum()),
        )

    def losses(self, which: slice = slice(None)) -> dict[int, Loss]:
        """Return what the tokens of some documents do not give back, by document."""
        chosen = range(len(self.windows.document_tokens))[which]
        return {d: loss for d, loss in sorted(self.windows.losses.items()) if d in chosen}

    def is_bound(self, document: int) -> bool:
        """Return whether the estimate of one document is, in expectation, a bound on its text."""
        return not self.note and document not in self.windows.losses

    def tail(self, which: slice = slice(None), piloted: bool = False) -> Tail:
        """Return what the draws of some documents show of their tail.

        Args:
            which: the documents.
            piloted: whether the error is the spread of the pilot.
        """
        if self.exact:
            return Tail(0.0, MANY_DRAWS, self.replicates)
        cells, count = self.cells(which), self.replicates
        if piloted:
            if len(self.pilot_spread):
                cells = torch.cat([self._of_windows(self.pilot_spread, which), cells])
            count = len(self.pilot)
        total, tokens = self.nats[:, which].sum(1).mean(), self.windows.document_tokens[which].sum()
        guessing = self.guess * float(tokens)
        return Tail(
            skewness=mean_skewness(cells, count),
            draws=int(self.draws[which].sum()) * len(cells) if len(self.draws) else MANY_DRAWS,
            replicates=len(cells),
            relative=float(total) / guessing if guessing else 0.0,
        )

    def cells(self, which: slice = slice(None)) -> Tensor:
        """Return the nats of independent cells of some documents, [R, C]: of windows, if known."""
        return self._of_windows(self.spread, which) if len(self.spread) else self.nats[:, which]

    def _of_windows(self, spread: Tensor, which: slice) -> Tensor:
        """Return the columns of [R, W] nats that belong to some documents."""
        start, stop, _ = which.indices(len(self.windows.document_tokens))
        ends = torch.searchsorted(self.windows.document, torch.tensor([start, stop]))
        return spread[:, slice(*ends.tolist())].contiguous()

    def _nothing(self, which: slice) -> str:
        """Return the message about documents without a token, which have no nats per token."""
        losses = self.losses(which)
        if losses:
            document, loss = next(iter(losses.items()))
            return (
                f"document {document + 1} has no token to score: its tokenizer loses it ({loss}); "
                "score it by another model"
            )
        name = "the text has" if which.start is None else f"document {which.start + 1} has"
        if self.windows.ends is None:
            return (
                f"{name} no token to score, so it has no bound; give a text with at least one "
                "character"
            )
        nats = float(self.nats[:, which].sum(1).mean())
        return f"{name} no token to share its bound among; ending costs {nats:.4f} nats"


def _lossy(losses: Mapping[int, Loss], documents: int) -> str:
    """Return why a bound over documents is none on their text; empty where it is one."""
    if not losses:
        return ""
    number, first = next(iter(losses.items()))
    unknown = sum(loss.unknown for loss in losses.values())
    left_out = f"; {unknown} unknown token(s) are not scored" if unknown else ""
    return (
        f"the tokens of {len(losses)} of {documents} document(s) do not give their text back (in "
        f"document {number + 1} {first}), so this is not of the text but of what they give back"
        + left_out
    )


def standard_error(values: Tensor, count: int | None = None) -> float:
    """Return the standard error of a mean of `count` draws (None: of these) with [R] values."""
    return float(values.std(correction=1)) / math.sqrt(count or len(values))


def text_error(nats: Tensor, tokens: Tensor) -> float | None:
    """Return the standard error of nats per token over documents: a ratio of sums, linearised.

    Args:
        nats: [D] nats.
        tokens: [D] tokens.

    Returns:
        None for a single document, and where one is impossible.
    """
    documents, total = len(tokens), tokens.sum()
    if documents < 2 or not bool(nats.isfinite().all()):
        return None
    residual = nats - nats.sum() / total * tokens
    return float((residual.square().sum() * documents / (documents - 1)).sqrt() / total)
