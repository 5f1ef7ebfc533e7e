"""Draws of tokens: one float64 uniform each through the inverse distribution function.

Positions are chosen before the network runs, so a rule never races positions against tokens in
float32. Such a race silently cuts off the tail of the vocabulary (Sec. 4, arXiv:2409.02908).
Letters: N drawn positions, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from textdiff.diffusion.objectives.objective import pick
from textdiff.errors import TextDiffError
from textdiff.models.devices import to_device
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls

Choose = Callable[[Tensor, Tensor | slice], Tensor]
"""choose(log-weights [n, V], which [n] of the N positions, on their device) -> [n] tokens."""

EVERY = slice(None)

FAINTEST = -1e4
"""Log-weight of a token that has no probability left, beside those of others that have some."""


def draw_tokens(
    log_x0: Tensor, u: Tensor, controls: Controls, context: Context | None = None
) -> Tensor:
    """Draw a token for each of N positions.

    Args:
        log_x0: [N, V] raw log-probabilities.
        u: [N] float64 uniforms in (0, 1).
        controls: how the drawing distribution departs from the model's.
        context: where the positions are, for controls that depend on it.

    Returns:
        [N] int64; a token of probability zero is never drawn.
    """
    temperature = controls.temperature(context, log_x0.device)

    def choose(log_weights: Tensor, which: Tensor | slice) -> Tensor:
        if controls.greedy:
            return log_weights.argmax(-1)
        return inverse_cdf(controls.truncated(log_weights, _at(temperature, which)), u[which])

    return _choose_tokens(log_x0, controls, context, choose)


def log_chances(
    log_x0: Tensor, tokens: Tensor, controls: Controls, context: Context | None = None
) -> Tensor:
    """Return the log-probability with which `draw_tokens` draws each of N tokens, [N] float64.

    Under a constraint each is conditional on those to its left that are drawn with it.

    Args:
        log_x0: [N, V] raw log-probabilities; gradients flow to them.
        tokens: [N] the tokens; -inf is that of one which is never drawn.
        controls: how the drawing distribution departs from the model's.
        context: where the positions are, for controls that depend on it.
    """
    temperature = controls.temperature(context, log_x0.device)
    drawn: list[tuple[Tensor, Tensor]] = []
    every = torch.arange(len(tokens), device=tokens.device)

    def choose(log_weights: Tensor, which: Tensor | slice) -> Tensor:
        taken = tokens[which]
        if controls.greedy:
            log_p = (log_weights.argmax(-1) == taken).double().log()
        elif controls.neutral and log_weights is log_x0:
            log_p = pick(log_x0, taken)
        else:
            log_p = _log_share(controls.truncated(log_weights, _at(temperature, which)), taken)
        drawn.append((every[which], log_p))
        return taken

    _choose_tokens(log_x0, controls, context, choose)
    order, log_p = map(torch.cat, zip(*drawn, strict=True))
    return torch.zeros_like(log_p).index_copy(0, order, log_p)


def _log_share(weights: Tensor, tokens: Tensor) -> Tensor:
    """Return [N] the log of tokens' shares of weights [N, V]; -inf where nothing has a weight."""
    share = pick(weights, tokens) / weights.sum(-1)
    return share.where(share > 0.0, 0.0).log()


def _at(temperature: float | Tensor, which: Tensor | slice) -> float | Tensor:
    return temperature[which] if isinstance(temperature, Tensor) else temperature


def _choose_tokens(
    log_x0: Tensor, controls: Controls, context: Context | None, choose: Choose
) -> Tensor:
    """Return a token for each position: all at once, or one by one under a constraint."""
    shaped = controls.shaped(log_x0, context)  # [N, V]
    if controls.constraint is None or context is None:
        return choose(shaped, EVERY)
    return _draw_jointly(shaped, controls, context, choose)


def draw_weighed(weights: Tensor, u: Tensor, controls: Controls, context: Context) -> Tensor:
    """Draw finished tokens from weights that controls have shaped already.

    Args:
        weights: [N, V] float64.
        u: [N] float64 uniforms.
        controls: only their constraint matters here.
        context: where the positions are.
    """
    if controls.constraint is None:
        return inverse_cdf(weights, u)

    def choose(log_weights: Tensor, which: Tensor | slice) -> Tensor:
        return inverse_cdf(log_weights.softmax(-1), u[which])

    return _draw_jointly(weights.log(), controls, context, choose)


def _draw_jointly(
    log_weights: Tensor,
    controls: Controls,
    context: Context,
    choose: Choose,
) -> Tensor:
    """Draw tokens that the constraint allows together, from left to right.

    Args:
        log_weights: [N, V].
        controls: with a constraint.
        context: where the positions are.
        choose: draws from their log-weights.
    """
    assert controls.constraint is not None
    context = controls.placed(context)
    draws = controls.constraint.begin(context, _possible(log_weights, controls, context))
    tokens = torch.zeros(len(log_weights), dtype=torch.int64, device=log_weights.device)
    columns = context.column
    for column in torch.unique(columns):
        which = (columns == column).nonzero().squeeze(1)
        sent = to_device(which, tokens.device)
        drawn = choose(draws.allow(which), sent)
        tokens = tokens.index_copy(0, sent, drawn)
        draws.put(which, drawn)
    return tokens


def _possible(log_weights: Tensor, controls: Controls, context: Context) -> Tensor:
    """Return [N, V] the same with a trace of everything that is not banned.

    A constraint may need a token whose probability the network has rounded to nothing.
    """
    allowed = controls.allowed(context)
    if allowed is None:
        allowed = context.vocabulary.clean.expand_as(log_weights)
    log_weights = log_weights.double().where(allowed, -torch.inf)
    # Relative to the row's largest: the log-weights of a hook may all be small.
    most = log_weights.amax(-1, keepdim=True)
    faintest = most.where(most > -torch.inf, 0.0) + FAINTEST
    return torch.maximum(log_weights, faintest).where(allowed, -torch.inf)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """Draw [N] columns in proportion to weights [N, V] (float64), by one uniform each.

    Raises:
        TextDiffError: on a CPU, a row whose weights do not add up to a positive, finite number.
            Elsewhere the check would wait for the device, and `Predictor.check` comes later.
    """
    column, total = _column(weights, u)
    if weights.device.type == "cpu":  # where a sequential sum does not rise where nothing is added
        _check_totals(total)
        return column
    return _with_weight(column, weights)


def _column(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return [N] columns where the running sum passes its share u, and the totals [N, 1]."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding cannot run past the last token with probability.
    target = torch.minimum(u.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    column = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return column.clamp(max=weights.shape[-1] - 1), total  # NaN is above all


def _with_weight(column: Tensor, weights: Tensor) -> Tensor:
    """Return columns [N], or the heaviest one where a parallel sum rose and nothing was added."""
    empty = ~(weights.gather(-1, column.unsqueeze(-1)).squeeze(-1) > 0.0)
    return torch.where(empty, weights.nan_to_num(nan=0.0).argmax(-1), column)


def _check_totals(total: Tensor) -> None:
    bad = ~((total > 0.0) & (total < torch.inf))
    if bool(bad.any()):
        raise TextDiffError(
            f"the weights of a token add up to {float(total[bad][0])}, so no token can be drawn; a "
            "hook or a constraint must leave every position at least one token of finite weight",
            code="no_token_to_draw",
        )
