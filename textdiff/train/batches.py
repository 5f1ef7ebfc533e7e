"""Corrupted training batches, as a pure function of (seed, step, slot in the global batch).

A slot is one row of one optimizer step; ranks and accumulation only decide who computes which
slots. Noise levels are stratified over all slots (and blocks) of a step and dealt out at random, so
every row's is marginally uniform.
"""

import signal
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textdiff.config import Config
from textdiff.data import Mixture, PackedSequences
from textdiff.diffusion.blocks import Blocks
from textdiff.diffusion.family import Family, draw_noise
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.randomness import Stream, stratified, uniforms
from textdiff.likelihood import Batch, corrupt


@dataclass(frozen=True)
class OpenBatch:
    """B rows of L positions whose masks are still open: they depend on what is being learned.

    Attributes:
        x0: [B, L] int64 clean tokens.
        v: [B, blocks] uniforms that place the times.
        u: [2, B, L] uniforms of the positions, for two masks of the same times.
        document_ids: [B, L], or None where attention ignores documents.
    """

    x0: Tensor
    v: Tensor
    u: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device) -> "OpenBatch":
        """The batch on a device, copied without waiting."""
        x0, v, u = (x.to(device, non_blocking=True) for x in (self.x0, self.v, self.u))
        ids = self.document_ids
        return OpenBatch(x0, v, u, None if ids is None else ids.to(device, non_blocking=True))


class TrainingBatches(Dataset[Batch | OpenBatch]):
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
        sequences: PackedSequences | Mixture,
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

    def __getitem__(self, index: int) -> Batch | OpenBatch:
        step, micro_step = divmod(index, self.accumulation)
        return self.batch(step, self.slots(micro_step))

    def batch(self, step: int, slots: Tensor) -> Batch | OpenBatch:
        """The rows of some slots of a step's global batch."""
        samples = step * self.config.train.global_batch_size + slots
        rows = self.sequences.rows(samples.tolist())
        x0 = torch.from_numpy(rows.tokens)
        ids = torch.from_numpy(rows.documents) if self.config.data.document_mask else None
        blocks = self.family.blocks(x0.shape[1])
        v = self._levels(step, slots, blocks)
        if self.family.learned is not None:
            pair = [self._uniforms(s, samples, blocks) for s in (Stream.POSITION, Stream.PAIR)]
            return OpenBatch(x0, v, torch.stack(pair), ids)
        return corrupt(self.family, x0, self._noise(v, samples, blocks), ids)

    def _noise(self, v: Tensor, samples: Tensor, blocks: Blocks) -> Noise:
        settings = self.config.diffusion.noise
        u = self._uniforms(Stream.POSITION, samples, blocks)
        u_token = None
        if self.family.process.draws_tokens:
            u_token = self._uniforms(Stream.TOKEN, samples, blocks)
        return draw_noise(self.family, settings.draw, v, u, blocks, None, settings.range, u_token)

    def _levels(self, step: int, slots: Tensor, blocks: Blocks) -> Tensor:
        """[B, blocks] uniforms of the noise levels, stratified over the global batch."""
        seed = self.config.run.seed
        entries = torch.arange(self.config.train.global_batch_size * blocks.count)
        strata = stratified(
            uniforms(seed, Stream.STRATA, step=step, position=entries),
            uniforms(seed, Stream.JITTER, step=step, position=entries),
        )
        return strata.view(-1, blocks.count)[slots]

    def _uniforms(self, stream: Stream, samples: Tensor, blocks: Blocks) -> Tensor:
        """[B, L] uniforms of the samples' positions."""
        positions = torch.arange(blocks.length)
        return uniforms(self.config.run.seed, stream, row=samples[:, None], position=positions)

    def loader(self, first_step: int, steps: int) -> Generator[Batch | OpenBatch]:
        """Micro-batches from `first_step` up to `steps`, prepared by the configured workers.

        The workers end when the generator is closed.
        """
        numbers = range(first_step * self.accumulation, steps * self.accumulation)
        batches = iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=numbers,
                num_workers=self.config.data.num_workers,
                worker_init_fn=_outlast_signals,
                pin_memory=torch.cuda.is_available(),
            )
        )
        try:
            yield from batches
        finally:
            del batches


def _outlast_signals(worker: int) -> None:
    """Leaves Ctrl-C and SIGTERM to the training process, also where a whole group receives them.

    It still needs batches to reach the step at which all processes stop; workers end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
