"""Corrupted training batches, as a pure function of (seed, step, slot in the global batch).

A slot is one row of one optimizer step; ranks and accumulation only decide who computes which
slots. Noise levels are stratified over all slots (and blocks) of a step and dealt out at random, so
every row's is marginally uniform.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textdiff.config import Config
from textdiff.data import PackedSequences
from textdiff.diffusion.family import Family, draw_noise
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.randomness import Stream, stratified, uniforms
from textdiff.likelihood import Batch, corrupt


class TrainingBatches(Dataset[Batch]):
    """Micro-batches of one process, by number: step * accumulation + micro-step.

    Args:
        sequences: the packed corpus.
        family: process, schedule, objective and block size (on the host).
        config: the run's config.
        rank: this process.
        processes: how many there are.
    """

    def __init__(
        self,
        sequences: PackedSequences,
        family: Family,
        config: Config,
        rank: int = 0,
        processes: int = 1,
    ):
        self.sequences = sequences
        self.family = family
        self.config = config
        self.rank = rank
        self.processes = processes

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and process."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.processes)

    def slots(self, micro_step: int) -> Tensor:
        """The slots of the global batch that this process computes in a micro-step."""
        size = self.config.train.micro_batch_size
        start = (micro_step * self.processes + self.rank) * size
        return torch.arange(start, start + size)

    def __getitem__(self, index: int) -> Batch:
        step, micro_step = divmod(index, self.accumulation)
        slots = self.slots(micro_step)
        samples = step * self.config.train.global_batch_size + slots
        rows = self.sequences.rows(samples.tolist())
        x0 = torch.from_numpy(rows.tokens)
        ids = torch.from_numpy(rows.documents) if self.config.data.document_mask else None
        return corrupt(self.family, x0, self._noise(step, slots, samples, x0.shape[1]), ids)

    def _noise(self, step: int, slots: Tensor, samples: Tensor, length: int) -> Noise:
        seed, settings = self.config.run.seed, self.config.diffusion.noise
        blocks = self.family.blocks(length)
        entries = torch.arange(self.config.train.global_batch_size * blocks.count)
        v = stratified(
            uniforms(seed, Stream.STRATA, step=step, position=entries),
            uniforms(seed, Stream.JITTER, step=step, position=entries),
        ).view(-1, blocks.count)[slots]
        u = uniforms(seed, Stream.POSITION, row=samples[:, None], position=torch.arange(length))
        u_token = None
        if self.family.process.draws_tokens:
            u_token = uniforms(
                seed, Stream.TOKEN, row=samples[:, None], position=torch.arange(length)
            )
        return draw_noise(self.family, settings.draw, v, u, blocks, None, settings.range, u_token)

    def loader(self, first_step: int, steps: int) -> Iterator[Batch]:
        """Micro-batches from `first_step` up to `steps`, prepared by the configured workers."""
        numbers = range(first_step * self.accumulation, steps * self.accumulation)
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=numbers,
                num_workers=self.config.data.num_workers,
                pin_memory=torch.cuda.is_available(),
            )
        )
