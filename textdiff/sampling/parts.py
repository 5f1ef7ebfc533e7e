"""Tables [N, V] of many positions, a bounded number of their rows at a time.

All positions of 16 texts of 1,024 tokens have 6.6 GB of float64 weights for GPT-2's vocabulary, and
rules and draws hold several such tables. Rows do not depend on each other. So logits alone are held
whole, in the network's dtype. Everything else is made for some positions at a time, and made again
where it is needed again. Few positions are one part, whose tables are made once. Letters: N
positions, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from textdiff.diffusion.leave_one_out import posterior_of
from textdiff.diffusion.objectives import Prediction
from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from textdiff.diffusion.process import ForwardProcess

    Index = Tensor | slice
    Make = Callable[[Index], Prediction]
    """make(which of the positions) -> their prediction."""

WEIGHTS = 2**27
"""Entries of a table alive at once: 1 GiB in float64."""

EVERY = slice(None)


def parts(count: int, size: int) -> list[slice]:
    """Return slices of positions whose rows of `size` entries are alive together; one at least."""
    rows = max(1, WEIGHTS // size)
    return [slice(start, start + rows) for start in range(0, max(1, count), rows)]


def by_parts(count: int, size: int, read: Callable[[slice], Tensor]) -> Tensor:
    """Return what a function makes of each part of the positions, one after another."""
    results = [read(chunk) for chunk in parts(count, size)]
    return results[0] if len(results) == 1 else torch.cat(results)


def lazily(count: int, size: int, make: Make) -> Prediction:
    """Return the prediction of all positions: made now if it is one part, else where it is read."""
    return make(EVERY) if len(parts(count, size)) == 1 else LazyPrediction(make)


def posterior_prediction(
    process: ForwardProcess, prediction: Prediction, tokens: Tensor, alpha: Tensor
) -> Prediction:
    """Return the prediction of clean tokens given all of the canvas, noise included.

    Args:
        process: noise that replaces tokens.
        prediction: of N positions.
        tokens: [N] their present tokens.
        alpha: [N] survival probability.
    """

    def make(index: Index) -> Prediction:
        return Prediction(posterior_of(process, prediction.at(index), tokens[index], alpha[index]))

    return lazily(len(tokens), len(process.vocabulary.clean), make)


class LazyPrediction(Prediction):
    """Prediction of many positions that is made for those that are read; see `Prediction`.

    Its own attributes make all of it, for whoever needs that.

    Args:
        make: makes the prediction of some positions.
    """

    def __init__(self, make: Make):
        self.make = make
        self.mixture = make(slice(0, 0)).mixture

    def at(self, index: Index) -> Prediction:
        """Return the prediction of some of the positions; a slice of them is made at once."""
        if isinstance(index, slice):
            return self if index == EVERY else self.make(index)
        return LazyPrediction(lambda inner: self.make(index[inner]))

    @cached_property
    def _whole(self) -> Prediction:
        return self.make(EVERY)

    @cached_property
    def log_x0(self) -> Tensor:
        """[N, V] log-probabilities of the clean token."""
        return self._whole.log_x0

    @property
    def log_score(self) -> Tensor | None:  # type: ignore[override]
        """[N, V] log ratios, or None."""
        return self._whole.log_score

    @property
    def log_state(self) -> Tensor | None:  # type: ignore[override]
        """[N, V] log-probabilities of a clean token or the mask, or None."""
        return self._whole.log_state
