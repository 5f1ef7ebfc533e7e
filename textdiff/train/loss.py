"""Denoiser and objective as one module: what is wrapped for training, and what it minimises.

The head and the objective run in chunks of positions whose gradients are taken at once, so that the
logits of a batch never exist together and nothing is computed twice.
"""

from typing import Any

import torch
from torch import Tensor, nn

from textdiff.diffusion.family import Family
from textdiff.likelihood import Batch, PositionTerms
from textdiff.models import TextDiffusionModel


class _ChunkedSum(torch.autograd.Function):
    """Sums the training loss over chunks of positions, taking each chunk's gradient at once.

    Its inputs are those of the head, then the head's parameters; it returns the training loss and
    the negative ELBO sample, both summed, the second without gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, terms: PositionTerms, count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, parameters = tensors[:count], tensors[count:]
        totals = torch.zeros(2, dtype=torch.float64, device=inputs[0].device)
        input_grads = [torch.empty_like(x) for x in inputs]
        grads = [torch.zeros_like(p) for p in parameters]
        for part in terms.chunks():
            with torch.enable_grad():
                leaves = [x[part].detach().requires_grad_() for x in inputs]
                losses, nelbo = terms.losses(part, *leaves)
                loss = losses.sum()
                found = torch.autograd.grad(loss, [*leaves, *parameters])
            totals += torch.stack([loss.detach(), nelbo.detach().sum()])
            for whole, grad in zip(input_grads, found, strict=False):
                whole[part] = grad
            torch._foreach_add_(grads, list(found[count:]))
        ctx.save_for_backward(*input_grads, *grads)
        loss, nelbo = totals
        ctx.mark_non_differentiable(nelbo)
        return loss, nelbo

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad.mul_(grad_loss) for grad in ctx.saved_tensors)


class DenoisingLoss(nn.Module):
    """A denoiser with its family's objective.

    Args:
        denoiser: the network.
        family: process, schedule, objective and block size.
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
        terms = PositionTerms(self.denoiser, self.family, batch)
        head = [p for p in terms.head.parameters() if p.requires_grad]
        inputs = terms.inputs
        return _ChunkedSum.apply(terms, len(inputs), *inputs, *head)  # type: ignore[no-any-return,no-untyped-call]
