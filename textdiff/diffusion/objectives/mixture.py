"""Divergences between two tokens-in-noise, of which one is plugged in; for a whole vocabulary.

With q(j) = alpha x(j) + b on the K clean tokens, x being either one token (x0) or the network's
distribution, everything that uniform noise costs is made of the Kullback-Leibler divergence and of
the Itakura-Saito divergence at the current token. Since one of the two is a constant but for one
entry, the sum over the vocabulary needs the network's alone: no one-hot row is built (the closed
form of arXiv:2506.10892, App. B).
"""

import torch
from torch import Tensor

from textdiff.diffusion.objectives.objective import pick
from textdiff.diffusion.process import Vocabulary

_LEAST = 1e-30  # its inverse fits float32


def sum_of_logs(values: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[N] float64: sum of log over the clean columns of values [N, V]."""
    tiny = torch.finfo(values.dtype).tiny
    logs = values.clamp(min=tiny).log()
    return logs.sum(-1).double() - logs[:, ~vocabulary.clean].sum(-1).double()


def divergences(
    log_x0: Tensor, x0: Tensor, xt: Tensor, alpha: Tensor, b: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """KL(q(. | x0) || q(. | log_x0)) and the Itakura-Saito divergence at x_t.

    Args:
        log_x0: [N, V] the network's log-probabilities.
        x0: [N] clean tokens.
        xt: [N] current tokens; where one is the mask, the second divergence is 0.
        alpha: [N] survival probability.
        b: [N] mass that noise gives each clean token.
        vocabulary: which rows are clean tokens.

    Returns:
        [N] nats and [N] r - 1 - ln r, with r = q(x_t | x0) / q(x_t | log_x0) (Eq. 11,
        arXiv:2503.04482).
    """
    # All of it relative to b: logs of q itself would cancel where little or nothing survives. Where
    # nothing is lost, b is 0 and what follows is its limit.
    b = b.clamp(min=_LEAST)
    ratio = alpha / b
    logs = torch.log1p(log_x0.exp() * ratio[:, None].to(log_x0.dtype)).sum(-1).double()
    zero = torch.zeros_like(ratio)
    at_x0 = torch.logaddexp(ratio.log() + pick(log_x0, x0), zero)
    kl = (alpha + b) * torch.log1p(ratio) - b * logs - alpha * at_x0
    at_xt = torch.logaddexp(ratio.log() + pick(log_x0, xt), zero)
    log_r = torch.where(xt == x0, torch.log1p(ratio), 0.0) - at_xt
    log_r = log_r.where(vocabulary.clean[xt], 0.0)
    return kl, torch.expm1(log_r) - log_r
