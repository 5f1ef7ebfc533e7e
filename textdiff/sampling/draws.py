"""Which token a position becomes: one float64 uniform through the inverse distribution function.

Positions are chosen before the network runs, so a rule never races positions against tokens in
float32, which silently cuts off the tail of the vocabulary (Sec. 4, arXiv:2409.02908).
"""

import torch
from torch import Tensor

from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls


def draw_tokens(
    log_x0: Tensor, u: Tensor, controls: Controls, context: Context | None = None
) -> Tensor:
    """Draws a token for each of N positions.

    Args:
        log_x0: [N, V] raw log-probabilities.
        u: [N] float64 uniforms in (0, 1).
        controls: how the law departs from the model's.
        context: where the positions are, for controls that depend on it.

    Returns:
        [N] int64; a token of probability zero is never drawn.
    """
    if controls.greedy:
        return controls.shaped(log_x0, context).argmax(-1)
    return inverse_cdf(controls.probabilities(log_x0, context), u)


def inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """[N] columns drawn in proportion to weights [N, V] (float64), by one uniform each."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that rounding cannot run past the last token with probability.
    target = torch.minimum(u.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    column = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return column.clamp(max=weights.shape[-1] - 1)  # NaN is above all; who predicted it is told
