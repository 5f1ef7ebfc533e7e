"""Denoiser and objective as one module: what is wrapped for training, and what it minimises.

`DenoisingLoss` takes noise that was made with the data; `LearnedNoiseLoss` makes it, by a schedule
whose parameters it trains too. In both the head and the objective run in chunks of positions whose
gradients are taken at once, so that the logits of a batch never exist together and nothing is
computed twice.
"""

from typing import Any

import torch
from torch import Tensor, nn

from textdiff.diffusion.family import Family, draw_noise
from textdiff.diffusion.noise import Noise
from textdiff.likelihood import Batch, PositionTerms, corrupt
from textdiff.models import TextDiffusionModel
from textdiff.train.batches import OpenBatch


class _ChunkedSum(torch.autograd.Function):
    """Sums the training loss over chunks of positions, taking each chunk's gradient at once.

    Its inputs are those of the head, then the parameters of head and schedule; it returns the
    training loss, summed, and [N] terms of the negative ELBO without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: PositionTerms, count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, parameters = tensors[:count], tensors[count:]
        total = torch.zeros((), dtype=torch.float64, device=inputs[0].device)
        nelbos = total.new_zeros(len(inputs[0]))
        input_grads = [torch.empty_like(x) for x in inputs]
        grads = [torch.zeros_like(p) for p in parameters]
        for part in terms.chunks():
            with torch.enable_grad():
                leaves = [x[part].detach().requires_grad_() for x in inputs]
                losses, nelbo = terms.losses(part, *leaves)
                loss = losses.sum()
                found = torch.autograd.grad(loss, [*leaves, *parameters])
            total += loss.detach()
            nelbos[part] = nelbo.detach()
            for whole, grad in zip(input_grads, found, strict=False):
                whole[part] = grad
            torch._foreach_add_(grads, list(found[count:]))
            del found, losses, nelbo, loss  # before the next chunk allocates its own
        ctx.save_for_backward(*input_grads, *grads)
        ctx.mark_non_differentiable(nelbos)
        return total, nelbos

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.mul_(grad_loss) for grad in ctx.saved_tensors)


def _chunked(terms: PositionTerms, *learned: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss, summed over positions, and [N] detached terms of the negative ELBO.

    Args:
        terms: the positions and their objective.
        *learned: parameters that the objective itself reads.
    """
    parameters = [p for p in (*terms.head.parameters(), *learned) if p.requires_grad]
    inputs = terms.inputs
    return _ChunkedSum.apply(terms, len(inputs), *inputs, *parameters)  # type: ignore[no-any-return,no-untyped-call]


def training_loss(denoiser: TextDiffusionModel, family: Family) -> nn.Module:
    """The module that a family trains with."""
    return (LearnedNoiseLoss if family.learned else DenoisingLoss)(denoiser, family)


class DenoisingLoss(nn.Module):
    """A denoiser with its family's objective.

    Args:
        denoiser: the network.
        family: process, schedule and objective; the block size is the batch's.
    """

    def __init__(self, denoiser: TextDiffusionModel, family: Family):
        super().__init__()
        self.denoiser = denoiser
        self.family = family

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the micro-batch, in nats and float64.

        Returns:
            The training loss, and the detached negative ELBO sample it stands for.
        """
        loss, nelbo = _chunked(PositionTerms(self.denoiser, self.family, batch))
        return loss, nelbo.sum()


class LearnedNoiseLoss(nn.Module):
    """A denoiser and the schedule it is trained under, by two masks z_1, z_2 of every example.

    With f the nats of a mask and q its probability at time t, both of which depend on the
    schedule's w, the gradient of E_q[f] is E_q[f' + f (ln q)']. The second part is estimated by
    (f_1 - f_2) ((ln q_1)' - (ln q_2)') / 2, where each mask's nats are the other's baseline
    (leave-one-out REINFORCE, App. I.2, arXiv:2406.04329), and per block, because the nats of a
    block depend on its own mask alone. Nothing is differentiated through the masks.

    Args:
        denoiser: the network.
        family: its schedule is `learned`.
    """

    def __init__(self, denoiser: TextDiffusionModel, family: Family):
        super().__init__()
        assert family.learned is not None
        self.denoiser = denoiser
        self.family = family
        self.schedule = family.learned

    def forward(self, batch: OpenBatch) -> tuple[Tensor, Tensor]:
        """Sums over the micro-batch, in nats and float64, means over the two masks.

        Returns:
            The training loss, whose gradient is the estimate and whose value is the bound's, and
            the detached negative ELBO sample.
        """
        family = self.family.with_block_size(batch.block_size)
        blocks = family.blocks(batch.x0.shape[1])
        with torch.no_grad():
            x0, v = batch.x0.repeat(2, 1), batch.v.repeat(2, 1)
            noise = draw_noise(family, "time", v, batch.u.flatten(0, 1), blocks, x0=x0)
            ids = batch.document_ids
            masked = corrupt(family, x0, noise, None if ids is None else ids.repeat(2, 1))
        terms = PositionTerms(self.denoiser, family, masked)
        loss, nelbo = _chunked(terms, *self.schedule.parameters())
        nats = nelbo.new_zeros(x0.numel()).index_add(0, masked.positions, nelbo).view(x0.shape)
        f_1, f_2 = blocks.split(nats, 0.0).sum(-1).chunk(2)  # [B, blocks] each
        log_q = blocks.split(log_mask(noise, self.schedule()[x0]), 0.0).sum(-1)
        log_q = log_q - log_q.detach()  # 0, with a gradient
        q_1, q_2 = log_q.chunk(2)
        score = ((f_1 - f_2) * (q_1 - q_2)).sum() / 2
        return loss / 2 + score, nelbo.sum() / 2


def log_mask(noise: Noise, pace: Tensor) -> Tensor:
    """[B, L] log-probability of each position's being hit or not, which it is to the power `pace`.

    Args:
        noise: drawn by time.
        pace: [B, L] exponents.
    """
    log_lost = pace * noise.threshold.log()
    return torch.where(noise.hit, log_lost, torch.log(-torch.expm1(log_lost)))
