"""Two readings of a network's distribution of the clean token, and their conversions.

Under noise that replaces tokens a position of x_t tells something about its own clean token. The
*leave-one-out* distribution l is conditional on all other positions of x_t only; udlm and gidd
networks are trained towards it. The *posterior* p is conditional on x_t as a whole; d3pm networks
are trained towards it. Bayes' rule converts them, with q(x_t | x_0) = alpha [x_t = x_0] + b at a
clean x_t:

    p(x_0) = l(x_0) q(x_t | x_0) / sum over y of l(y) q(x_t | y).

Under uniform noise that multiplies l at x_t by 1 + K alpha / (1 - alpha) and normalises; at a mask
both are the same. The ratios of a score follow from l: (alpha l(y) + b) / (alpha l(x_t) + b), the
concrete score of arXiv:2310.16834; `ForwardProcess.log_score` and `log_x0` convert them. Letters: N
positions, V vocabulary, K clean tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from textdiff.section import Tensor, torch

if TYPE_CHECKING:
    from textdiff.diffusion.objectives import Prediction
    from textdiff.diffusion.process import ForwardProcess


def log_posterior(
    process: ForwardProcess, log_left_out: Tensor, xt: Tensor, alpha: Tensor
) -> Tensor:
    """Return log p(x_0 | x_t), [N, V] float64, of leave-one-out log-probabilities.

    Args:
        process: noise that replaces tokens.
        log_left_out: [N, V] log l.
        xt: [N] current tokens.
        alpha: [N] survival probability.
    """
    return process.posterior(log_left_out, xt, torch.ones_like(alpha), alpha).log()


def log_leave_one_out(
    process: ForwardProcess, log_posterior: Tensor, xt: Tensor, alpha: Tensor
) -> Tensor:
    """Return log l, [N, V] float64, of log p(x_0 | x_t): the inverse of `log_posterior`."""
    likelihood = process.likelihood(xt, torch.ones_like(alpha), alpha)
    possible = process.vocabulary.clean & (likelihood > 0.0)
    odds = log_posterior.double() - likelihood.log()
    return odds.where(possible, -torch.inf).log_softmax(-1)


def posterior_of(
    process: ForwardProcess, prediction: Prediction, xt: Tensor, alpha: Tensor
) -> Tensor:
    """Return log p(x_0 | x_t) of a prediction, [N, V] float64."""
    if prediction.mixture:
        return prediction.log_x0.double()
    return log_posterior(process, prediction.log_x0, xt, alpha)


def leave_one_out_of(
    process: ForwardProcess, prediction: Prediction, xt: Tensor, alpha: Tensor
) -> Tensor:
    """Return the leave-one-out log-probabilities of a prediction, [N, V] float64."""
    if prediction.mixture:
        return log_leave_one_out(process, prediction.log_x0, xt, alpha)
    return prediction.log_x0.double()
