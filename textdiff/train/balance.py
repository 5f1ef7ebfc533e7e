"""Rows of a global batch dealt to micro-batches that mask about equally many tokens.

Processes exchange gradients when all have theirs, so the one with the most masked positions, whose
head computes longest, keeps the others waiting. Noise levels are stratified over the global batch
and known before anything is computed. Which process computes a row changes no row and no noise.
Padding to a fixed number of positions would make all compute as many as the largest.
"""

from torch import Tensor


def deal_rows(levels: Tensor, hands: int) -> Tensor:
    """Divide rows into groups of about equal levels: forwards and backwards in their order.

    Args:
        levels: [rows] mean noise level of each row.
        hands: number of groups, which divides the rows.

    Returns:
        [hands, rows / hands] indices of rows, ascending in each group.
    """
    order = levels.argsort(stable=True).view(-1, hands)
    order[1::2] = order[1::2].flip(-1)
    return order.T.sort(-1).values
