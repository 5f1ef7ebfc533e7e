"""One corrupted batch, and the nats that a denoiser pays at its hit positions.

Training and likelihood share this: the first with gradients and its own weights, the second in
float64 sums over many draws.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.models import Layout, TextDiffusionModel, training_layout

# Logits alive at once: 2 ** 22 of them are 16 MiB in float32, which memory allocators reuse.
CHUNK_LOGITS = 2**22


@dataclass(frozen=True)
class Batch:
    """A corrupted batch of B rows, L positions, N hit positions.

    Attributes:
        x0: [B, L] int64 clean tokens.
        xt: [B, L] int64 noisy tokens.
        positions: [N] int64 flat indices of the hit positions.
        noise: the noise at those positions, [N] each.
        sigma: [B, blocks] total noise per block.
        document_ids: [B, L] (-1: padding), or None where attention ignores documents.
    """

    x0: Tensor
    xt: Tensor
    positions: Tensor
    noise: Noise
    sigma: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        noise = Noise(*(move(getattr(self.noise, field.name)) for field in fields(Noise)))
        ids = None if self.document_ids is None else move(self.document_ids)
        return Batch(
            move(self.x0), move(self.xt), move(self.positions), noise, move(self.sigma), ids
        )


def corrupt(family: Family, x0: Tensor, noise: Noise, document_ids: Tensor | None) -> Batch:
    """Corrupts x0 [B, L] on the host, where noise is made and positions are counted."""
    xt = family.process.corrupt(x0, noise)
    positions = noise.hit.flatten().nonzero().squeeze(1)
    starts = torch.arange(0, x0.shape[1], family.blocks(x0.shape[1]).size)
    sigma = -torch.log(noise.alpha.expand(x0.shape)[:, starts]).float()
    return Batch(x0, xt, positions, noise.at(positions), sigma, document_ids)


class PositionTerms:
    """The hidden states at a batch's hit positions, and the objective on top of them.

    Args:
        denoiser: the network; its trunk runs here, its head when called.
        family: process, schedule, objective and block size.
        batch: the corrupted batch.
    """

    def __init__(self, denoiser: TextDiffusionModel, family: Family, batch: Batch):
        layout: Layout = training_layout(family.block_size).within(batch.document_ids)
        context = batch.x0 if layout.streams == 2 else None
        hidden, condition = denoiser.hidden(batch.xt, context, batch.sigma, layout)
        self.hidden = hidden.flatten(0, 1)[batch.positions]
        self.condition = None if condition is None else condition.flatten(0, 1)[batch.positions]
        self.x0 = batch.x0.flatten()[batch.positions]
        self.xt = batch.xt.flatten()[batch.positions]
        self.noise = batch.noise
        self.head = denoiser.output_layer
        self.objective = family.objective
        self.chunk = max(1, CHUNK_LOGITS // denoiser.config.vocab_size)

    @property
    def inputs(self) -> list[Tensor]:
        """What the head reads: hidden states [N, H] and, with adaln, conditions [N, C]."""
        return [self.hidden] if self.condition is None else [self.hidden, self.condition]

    def __call__(self, part: slice, *inputs: Tensor) -> tuple[Tensor, Noise]:
        """The negative ELBO terms [n] in nats of one chunk of positions, and their noise.

        Args:
            part: the chunk.
            *inputs: that part of `inputs`, as leaves of a graph where gradients are wanted.
        """
        noise = Noise(*(getattr(self.noise, field.name)[part] for field in fields(Noise)))
        prediction = self.objective.predict(self.head(*inputs), self.xt[part], noise.alpha)
        return self.objective.nelbo_terms(prediction, self.x0[part], self.xt[part], noise), noise

    def chunks(self) -> list[slice]:
        """Slices of positions whose logits are alive together."""
        return [slice(i, i + self.chunk) for i in range(0, len(self.x0), self.chunk)]

    def all(self) -> Tensor:
        """[N] nats at every hit position, without gradients."""
        terms = [self(part, *(x[part] for x in self.inputs))[0] for part in self.chunks()]
        return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)
