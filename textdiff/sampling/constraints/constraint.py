"""What a constraint is: it says, token after token, what may still be drawn.

Tokens that are drawn in one network call must be possible together, so under a constraint a row's
are drawn one after the other, from left to right. A grammar of the user's own is a class with the
methods of `Constraint`. Letters: N drawn positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from textdiff.sampling.context import Context
from textdiff.sampling.job import Job


class Draws(Protocol):
    """The draws of one network call, every row's from left to right."""

    def allow(self, which: Tensor) -> Tensor:
        """[n, V] log-weights to draw from at some of the N positions, one of each row.

        At least one of each position is finite.
        """

    def put(self, which: Tensor, tokens: Tensor) -> None:
        """They have become these tokens."""


class Constraint(Protocol):
    """A law that generated text keeps, whatever the order that it is written in."""

    def check(self, job: Job) -> None:
        """Stops before the network runs if no text of a row can keep the law.

        Raises:
            ConfigError: with the reason.
        """

    def begin(self, context: Context, log_weights: Tensor) -> Draws:
        """The draws of one call.

        Args:
            context: the canvas and the positions that are drawn.
            log_weights: [N, V] what would be drawn from without the constraint; -inf is impossible.
        """


def draw_jointly(
    constraint: Constraint,
    context: Context,
    log_weights: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Draws tokens that are possible together.

    Args:
        constraint: the law.
        context: where they are.
        log_weights: [N, V].
        choose: of log-weights [n, V] at some of the N positions [n], the tokens [n].

    Returns:
        [N] tokens.
    """
    draws = constraint.begin(context, log_weights)
    tokens = torch.zeros(len(log_weights), dtype=torch.int64, device=log_weights.device)
    columns = context.column
    for column in sorted(set(columns.tolist())):
        which = (columns == column).nonzero().squeeze(1)
        chosen = choose(draws.allow(which), which)
        draws.put(which, chosen)
        tokens[which.to(tokens.device)] = chosen
    return tokens
