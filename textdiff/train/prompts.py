"""Training rows whose beginning is fixed: prompts, some of them hidden (prompt dropout).

A prompt is a row's beginning up to a random place. It is clean at every noise level and contributes
nothing to the loss: the row trains the rest of a text conditional on a prompt. Where it is hidden,
the mask replaces its tokens at every noise level: the row trains the unconditional side of
classifier-free guidance (arXiv:2412.10193).

In blocks, all finished ones are clean already and are trained as blocks of their own. What is left
is the beginning of one block: any of the row where it is shown, the first one where it is hidden,
since then nothing stands before it in generation either. Letters: B rows, L positions.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textdiff.diffusion.family import Blocks
from textdiff.loss import Batch


@dataclass(frozen=True)
class Prompts:
    """Positions of some rows that are fixed.

    Attributes:
        given: [B, L] bool, positions that are neither noised nor scored.
        hidden: [B, L] bool, those of them that the network does not see.
    """

    given: Tensor
    hidden: Tensor

    @classmethod
    def draw(cls, u: Tensor, blocks: Blocks, share: float, dropout: float) -> "Prompts":
        """Return the prompts of some rows.

        Args:
            u: [B, 3] uniforms: whether there is a prompt, whether it is hidden, where it ends.
            blocks: how L falls into blocks.
            share: of the rows that have a prompt.
            dropout: share of these that are hidden.
        """
        prompted, hidden = (u[:, 0] < share)[:, None], (u[:, 1] < dropout)[:, None]
        length = blocks.length
        end = (u[:, 2:] * length).to(torch.int64).clamp(max=length - 1)  # [B, 1], uniform on 0..L-1
        start = end // blocks.size * blocks.size
        start, end = torch.where(hidden, 0, start), torch.where(hidden, end - start, end)
        at = torch.arange(length)
        given = prompted & (at >= start) & (at < end)
        return cls(given, given & hidden)

    def repeated(self, times: int) -> "Prompts":
        """Return the prompts of the same rows, several times over."""
        return Prompts(self.given.repeat(times, 1), self.hidden.repeat(times, 1))

    def hide(self, batch: Batch, mask_token_id: int) -> Batch:
        """Return the batch with masks for hidden tokens, also in the context of later blocks."""
        hidden = self.hidden.to(batch.xt.device)
        return replace(
            batch,
            xt=batch.xt.masked_fill(hidden, mask_token_id),
            x0=batch.x0.masked_fill(hidden, mask_token_id),
        )


def scored_share(blocks: Blocks, share: float) -> float:
    """Return the expected share of a row's positions that are not part of a prompt.

    A prompt takes the positions between its block's beginning and its own end, which is uniform on
    the L places of the row.
    """
    place = torch.arange(blocks.length) % blocks.size
    return 1.0 - share * float(place.sum()) / blocks.length**2
