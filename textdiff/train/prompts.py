"""Training rows whose beginning is given: prompts, some of them hidden (prompt dropout).

A prompt is a row's beginning up to a random place. It is clean at every noise level and costs no
nats: the row is trained as the rest of a text under a given beginning. Where it is hidden, the mask
stands in place of its tokens, whatever the noise: what is trained is the rest without it, the other
side of classifier-free guidance (arXiv:2412.10193).

In blocks, all finished ones are clean already and are trained as blocks of their own. What is left
is the beginning of one block: any of the row where it is shown, the first one where it is hidden,
since then nothing stands before it in generation either. Letters: B rows, L positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiff.diffusion.blocks import Blocks
from textdiff.loss import Batch


@dataclass(frozen=True)
class Prompts:
    """Which positions of some rows are given.

    Attributes:
        given: [B, L] bool, positions that are neither noised nor scored.
        hidden: [B, L] bool, those of them that the network does not see.
    """

    given: Tensor
    hidden: Tensor

    @classmethod
    def draw(cls, u: Tensor, blocks: Blocks, share: float, dropout: float) -> "Prompts":
        """The prompts of some rows.

        Args:
            u: [B, 3] uniforms: whether there is a prompt, whether it is hidden, where it ends.
            blocks: how L falls into blocks.
            share: of the rows that have a prompt.
            dropout: share of these that are hidden.
        """
        there, hidden = (u[:, 0] < share)[:, None], (u[:, 1] < dropout)[:, None]
        length = blocks.length
        end = (u[:, 2:] * length).to(torch.int64).clamp(max=length - 1)  # [B, 1], uniform on 0..L-1
        start = end // blocks.size * blocks.size
        start, end = torch.where(hidden, 0, start), torch.where(hidden, end - start, end)
        at = torch.arange(length)
        given = there & (at >= start) & (at < end)
        return cls(given, given & hidden)

    def hide(self, batch: Batch, mask_token_id: int) -> Batch:
        """The batch with masks for hidden tokens, also where later blocks look back at them."""
        hidden = self.hidden.to(batch.xt.device)
        return replace(
            batch,
            xt=batch.xt.masked_fill(hidden, mask_token_id),
            x0=batch.x0.masked_fill(hidden, mask_token_id),
        )


def scored_share(blocks: Blocks, share: float) -> float:
    """Expected share of a row's positions that are no prompt.

    A prompt takes as many positions of its block as its end lies behind the block's beginning, and
    the end is uniform on the L places of the row.
    """
    place = torch.arange(blocks.length) % blocks.size
    return 1.0 - share * float(place.sum()) / blocks.length**2
