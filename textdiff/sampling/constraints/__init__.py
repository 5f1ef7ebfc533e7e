"""Constraints on generated text: after each token, they decide which may still be drawn.

Tokens that are drawn in one network call must be possible together. So under a constraint a row's
are drawn one after the other, from left to right. A grammar of your own is a class with the methods
of `Constraint`. Letters: N drawn positions, V vocabulary.
"""

from typing import Protocol

from torch import Tensor

from textdiff.sampling.context import Context
from textdiff.sampling.job import Job


class Draws(Protocol):
    """The draws of one network call, every row's from left to right."""

    def allow(self, which: Tensor) -> Tensor:
        """Return [n, V] log-weights to draw from at some of the N positions, one of each row.

        At least one of each position is finite.
        """

    def put(self, which: Tensor, tokens: Tensor) -> None:
        """Take note of the tokens drawn there."""


class Constraint(Protocol):
    """A condition that generated text fulfils, whatever the order that it is written in."""

    def check(self, job: Job) -> None:
        """Refuse a job before the network runs if no text of a row can fulfil the condition.

        Raises:
            ConfigError: with the reason.
        """

    def begin(self, context: Context, log_weights: Tensor) -> Draws:
        """Begin the draws of one call.

        Args:
            context: the canvas and the positions that are drawn.
            log_weights: [N, V] unconstrained log-weights; -inf is impossible.
        """
