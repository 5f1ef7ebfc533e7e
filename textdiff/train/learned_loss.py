"""The module that training wraps, by family: where the noise schedule has parameters, a larger one.

Letters: B rows, L positions.
"""

import torch
from torch import Tensor, nn

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import ByTime, draw_noise
from textdiff.loss import CleanBatch, DenoisingLoss, HeadSum, PositionTerms, corrupt, log_mask
from textdiff.models import Denoiser


def training_loss(denoiser: Denoiser, family: Family) -> nn.Module:
    """Return the module that a family trains with."""
    return (LearnedScheduleLoss if family.learned else DenoisingLoss)(denoiser, family)


class LearnedScheduleLoss(nn.Module):
    """A denoiser and the schedule it is trained with, by two masks z_1, z_2 of every example.

    Let f be the loss of a mask in nats and q its probability at time t, which both depend on the
    schedule's w. The gradient of E_q[f] is E_q[f' + f (ln q)']. The second term is estimated by
    (f_1 - f_2) ((ln q_1)' - (ln q_2)') / 2. Each mask's loss is the other's baseline (leave-one-out
    REINFORCE, App. I.2, arXiv:2406.04329). It is taken per block, because the loss of a block
    depends on its own mask alone. Nothing is differentiated through the masks.

    Masks are drawn on the device of the schedule. A GPU counts the masked positions. The CPU reads
    their number once the network's blocks are queued, so that the GPU has work meanwhile.

    Args:
        denoiser: the network.
        family: its schedule is `learned`.
    """

    def __init__(self, denoiser: Denoiser, family: Family):
        super().__init__()
        assert family.learned is not None
        self.denoiser = denoiser
        self.family = family
        self.schedule = family.learned
        self.head_sum = HeadSum(denoiser.output_layer)

    def forward(self, batch: CleanBatch) -> tuple[Tensor, Tensor]:
        """Sum over the micro-batch, in nats and float64, means over the two masks.

        Returns:
            The training loss, whose gradient is the estimate and whose value is the bound's, and
            the detached sample of the negative ELBO.
        """
        family = self.family.with_block_size(batch.block_size)
        blocks = family.blocks(batch.x0.shape[1])
        with torch.no_grad():
            x0 = batch.x0.repeat(2, 1)
            noise = draw_noise(family, x0, batch.uniforms, ByTime())
            ids = batch.document_ids
            masked = corrupt(family, x0, noise, None if ids is None else ids.repeat(2, 1))
            if batch.first_rows is not None:
                rows = batch.first_rows
                masked = masked.self_conditioned(torch.cat([rows, rows + len(batch.x0)]))
        terms = PositionTerms(self.denoiser, family, masked, training=True)
        loss, nelbo = self.head_sum.of(terms, self.schedule)
        at = masked.positions[: len(nelbo)]  # the rest, on a device, is not masked
        nats = nelbo.new_zeros(x0.numel()).index_add(0, at, nelbo).view(x0.shape)
        f_1, f_2 = blocks.split(nats, 0.0).sum(-1).chunk(2)  # [B, blocks] each
        log_q = blocks.split(log_mask(noise, self.schedule()[x0]), 0.0).sum(-1)
        log_q = log_q - log_q.detach()  # 0, with a gradient
        q_1, q_2 = log_q.chunk(2)
        score = ((f_1 - f_2) * (q_1 - q_2)).sum() / 2
        return loss / 2 + score, nelbo.sum() / 2
