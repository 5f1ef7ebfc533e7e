"""Some windows as one replicate of an estimator sees them, with their random numbers."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.family import Family
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.randomness import Index, Stream, uniforms


@dataclass(frozen=True)
class WindowBatch:
    """B windows of L positions, the shorter ones padded.

    Attributes:
        family: the family, with its tables on the host.
        seed: seed of the noise.
        replicate: index of the replicate.
        window: [B] int64, index of each window in the job.
        document: [B] int64, the document each is of.
        index: [B] int64, its place in that document.
        x0: [B, L] int64 clean tokens.
        real: [B, L] bool, False at padding.
        scorable: [B, L] bool, True where the token's nats are wanted; elsewhere it is context.
        v: [B, S, blocks] float64 stratified uniforms.
        learned: what the estimator has learned about these windows, [B, ...].
        allocation: how it deals its rows out to noise levels, [B, ...].
    """

    family: Family
    seed: int
    replicate: int
    window: Tensor
    document: Tensor
    index: Tensor
    x0: Tensor
    real: Tensor
    scorable: Tensor
    v: Tensor
    learned: Tensor | None = None
    allocation: Tensor | None = None

    @cached_property
    def blocks(self) -> Blocks:
        """How the L positions fall into blocks."""
        return self.family.blocks(self.x0.shape[1])

    @cached_property
    def sizes(self) -> Tensor:
        """[B, blocks] int64, scorable tokens of each block."""
        return self.blocks.split(self.scorable, False).sum(-1)

    def uniforms(self, stream: Stream, draw: int = 0, draws: int = 1) -> Tensor:
        """[B, L] uniforms of draw number `draw` out of `draws` per replicate."""
        keys: dict[str, Index] = {
            "row": self.document[:, None],
            "block": self.index[:, None],
            "step": self.replicate * draws + draw,
            "position": torch.arange(self.x0.shape[1]),
        }
        return uniforms(self.seed, stream, **keys)

    def noise_uniforms(self, levels: Tensor, draw: int = 0, draws: int = 1) -> NoiseUniforms:
        """Return the uniforms of a draw's noise at given levels [B, blocks]."""
        position = self.uniforms(Stream.POSITION, draw, draws)
        draws_tokens = self.family.process.draws_tokens
        token = self.uniforms(Stream.TOKEN, draw, draws) if draws_tokens else None
        return NoiseUniforms(levels, position, token)
