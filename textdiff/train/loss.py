"""Denoiser and objective as one module: what is wrapped for training, and what it minimises.

The head and the objective run in chunks of positions whose gradients are taken at once, so that the
logits of a batch never exist together and nothing is computed twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.models import Layout, TextDiffusionModel, training_layout

# Logits alive at once: 2 ** 24 of them are 64 MiB in float32.
CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class Batch:
    """A corrupted micro-batch of B rows, L positions, N hit positions.

    Attributes:
        x0: [B, L] int64 clean tokens.
        xt: [B, L] int64 noisy tokens.
        positions: [N] int64 flat indices of the hit positions.
        noise: the noise at those positions.
        sigma: [B, blocks] total noise per block.
        document_ids: [B, L], or None where attention ignores documents.
    """

    x0: Tensor
    xt: Tensor
    positions: Tensor
    noise: Noise
    sigma: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""

        def move(value: Tensor | Noise | None) -> Tensor | Noise | None:
            if isinstance(value, Noise):
                return Noise(*(getattr(value, f.name).to(device) for f in fields(Noise)))
            return None if value is None else value.to(device, non_blocking=True)

        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))  # type: ignore[arg-type]


class _ChunkedSum(torch.autograd.Function):
    """Sums a function of (hidden, parameters) over chunks, taking each chunk's gradient at once."""

    @staticmethod
    def forward(ctx, terms_of, chunk, hidden, *parameters):  # type: ignore[no-untyped-def]
        totals = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grads = [torch.zeros_like(p) for p in parameters]
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                leaf = hidden[part].detach().requires_grad_()
                loss, nelbo = terms_of(leaf, part)
                found = torch.autograd.grad(loss, [leaf, *parameters])
            totals += torch.stack([loss.detach(), nelbo.detach()])
            grad_hidden[part] = found[0]
            torch._foreach_add_(grads, list(found[1:]))
        ctx.save_for_backward(grad_hidden, *grads)
        loss, nelbo = totals
        ctx.mark_non_differentiable(nelbo)
        return loss, nelbo

    @staticmethod
    def backward(ctx, grad_loss, _):  # type: ignore[no-untyped-def]
        grads = list(ctx.saved_tensors)
        for grad in grads:
            grad.mul_(grad_loss)
        return None, None, *grads


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
        self.layout: Layout = training_layout(family.block_size)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the micro-batch, in nats and float64.

        Returns:
            The training loss, and the detached negative ELBO sample it stands for.
        """
        context = batch.x0 if self.layout.streams == 2 else None
        hidden, condition = self.denoiser.hidden(
            batch.xt, context, batch.sigma, self.layout.within(batch.document_ids)
        )
        hidden = hidden.flatten(0, 1)[batch.positions]
        if condition is not None:
            condition = condition.flatten(0, 1)[batch.positions]
        head, objective = self.denoiser.output_layer, self.family.objective
        x0 = batch.x0.flatten()[batch.positions]
        xt = batch.xt.flatten()[batch.positions]

        def terms_of(leaf: Tensor, part: slice) -> tuple[Tensor, Tensor]:
            noise = Noise(*(getattr(batch.noise, f.name)[part] for f in fields(Noise)))
            logits = head(leaf, None if condition is None else condition[part])
            prediction = objective.predict(logits, xt[part], noise.alpha)
            nelbo = objective.nelbo_terms(prediction, x0[part], xt[part], noise)
            return (nelbo * objective.training_scale(noise)).sum(), nelbo.sum()

        return self._sum(terms_of, hidden, self.denoiser.config.vocab_size)

    def _sum(
        self, terms_of: Callable[[Tensor, slice], tuple[Tensor, Tensor]], hidden: Tensor, vocab: int
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_LOGITS // vocab)
        head = [p for p in self.denoiser.output_layer.parameters() if p.requires_grad]
        return _ChunkedSum.apply(terms_of, chunk, hidden, *head)  # type: ignore[no-any-return,no-untyped-call]
