"""One corrupted batch, and the nats that a denoiser pays at its hit positions.

Training and likelihood share this: the first with gradients and its own weights, the second in
float64 sums over many draws.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.objectives import Prediction
from textdiff.models import CAUSAL, TextDiffusionModel, late, training_layout

# Logits alive at once: 2 ** 22 of them are 16 MiB in float32, which memory allocators reuse.
CHUNK_LOGITS = 2**22


@dataclass(frozen=True)
class Batch:
    """A corrupted batch of B rows, L positions, N positions that cost nats.

    Attributes:
        x0: [B, L] int64 clean tokens.
        xt: [B, L] int64 noisy tokens.
        positions: [N] int64 flat indices of those positions.
        noise: the noise at those positions, [N] each.
        sigma: [B, blocks] total noise per block.
        document_ids: [B, L] (-1: padding), or None where attention ignores documents.
        block_size: tokens per block; None: the whole sequence.
    """

    x0: Tensor
    xt: Tensor
    positions: Tensor
    noise: Noise
    sigma: Tensor
    document_ids: Tensor | None
    block_size: int | None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, copied without waiting."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        noise = self.noise.map(move)
        ids = None if self.document_ids is None else move(self.document_ids)
        x0, xt, positions, sigma = map(move, (self.x0, self.xt, self.positions, self.sigma))
        return Batch(x0, xt, positions, noise, sigma, ids, self.block_size)


def corrupt(family: Family, x0: Tensor, noise: Noise, document_ids: Tensor | None) -> Batch:
    """Corrupts x0 [B, L] on the host, where noise is made and positions are counted."""
    xt = family.process.corrupt(x0, noise)
    positions = family.objective.positions(noise).flatten().nonzero().squeeze(1)
    starts = torch.arange(0, x0.shape[1], family.blocks(x0.shape[1]).size)
    alpha = family.known_alpha(noise.alpha.expand(x0.shape)[:, starts])
    sigma = -torch.log(alpha).float()
    at = noise.at(positions)
    return Batch(x0, xt, positions, at, sigma, document_ids, family.block_size)


class PositionTerms:
    """The hidden states at the positions that cost nats, and the objective on top of them.

    Args:
        denoiser: the network; its trunk runs here, its head when called.
        family: process, schedule and objective; the block size is the batch's.
        batch: the corrupted batch.
    """

    def __init__(self, denoiser: TextDiffusionModel, family: Family, batch: Batch):
        tokens, layout = batch.xt, training_layout(batch.block_size)
        if family.objective.shifted:
            tokens = late(batch.x0, family.process.mask_token_id, batch.document_ids)
            layout = CAUSAL
        context = batch.x0 if layout.streams == 2 else None
        self.hidden, self.condition = denoiser.hidden(
            tokens, context, batch.sigma, layout.within(batch.document_ids), batch.positions
        )
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

    def predict(self, part: slice, *inputs: Tensor) -> Prediction:
        """The prediction at one chunk of positions.

        Args:
            part: the chunk.
            *inputs: that part of `inputs`, as leaves of a graph where gradients are wanted.
        """
        return self.objective.predict(self.head(*inputs), self.xt[part], self.noise.alpha[part])

    def nelbo(self, part: slice, prediction: Prediction) -> Tensor:
        """[n] nats of one chunk: its terms of the negative ELBO."""
        noise = self.noise.map(lambda value: value[part])
        return self.objective.nelbo_terms(prediction, self.x0[part], self.xt[part], noise)

    def losses(self, part: slice, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[n] training losses and [n] negative ELBO terms of one chunk."""
        noise = self.noise.map(lambda value: value[part])
        x0, xt = self.x0[part], self.xt[part]
        prediction = self.predict(part, *inputs)
        nelbo = self.objective.nelbo_terms(prediction, x0, xt, noise)
        return self.objective.loss_terms(nelbo, prediction, x0, xt, noise), nelbo

    def chunks(self) -> list[slice]:
        """Slices of positions whose logits are alive together."""
        return [slice(i, i + self.chunk) for i in range(0, len(self.x0), self.chunk)]

    def all(self) -> Tensor:
        """[N] nats at every position, without gradients."""
        terms = [
            self.nelbo(part, self.predict(part, *(x[part] for x in self.inputs)))
            for part in self.chunks()
        ]
        return torch.cat(terms) if terms else torch.zeros(0, dtype=torch.float64)
