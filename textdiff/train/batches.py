"""Corrupted training batches, as a pure function of (seed, step, slot in the global batch).

A slot is one row of one optimizer step; ranks and accumulation only decide who computes which slots
(see `balance`). Noise levels are stratified over all slots (and blocks) of a step and dealt out at
random, so every row's is marginally uniform.
"""

import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textdiff.config import Config
from textdiff.data.answer_rows import AnswerSequences
from textdiff.data.sequences import Mixture, PackedSequences
from textdiff.diffusion.family import Blocks, Family
from textdiff.diffusion.noise import ALL_RATES, NoiseMaker, NoiseUniforms, Rates, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.randomness import Stream, level_uniforms, uniforms
from textdiff.errors import LostProcessError
from textdiff.loss import Batch, CleanBatch, corrupt
from textdiff.train.balance import deal_rows
from textdiff.train.distributed import guard_hint
from textdiff.train.prompts import Prompts, scored_share


class TrainingBatches(Dataset[Batch | CleanBatch]):
    """Micro-batches of one process, by number: step * accumulation + micro-step.

    Attributes:
        ranges: mask rates in force, by block size.

    Args:
        sequences: the packed corpus.
        family: process, schedule, objective and block size (on the host).
        config: the run's config.
        rank: this process.
        processes: how many there are.
    """

    def __init__(
        self,
        sequences: PackedSequences | Mixture | AnswerSequences,
        family: Family,
        config: Config,
        rank: int = 0,
        processes: int = 1,
    ):
        self.sequences, self.family, self.config = sequences, family, config
        self.rank, self.processes = rank, processes
        fixed = config.diffusion.noise.range
        start = ALL_RATES if fixed == "search" else fixed
        self.ranges: dict[int | None, Rates] = dict.fromkeys(config.diffusion.block_sizes, start)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step and process."""
        train = self.config.train
        return train.global_batch_size // (train.micro_batch_size * self.processes)

    def slots(self, step: int, micro_step: int) -> Tensor:
        """Return the slots of a step's global batch that this process computes in a micro-step."""
        train, place = self.config.train, micro_step * self.processes + self.rank
        size = train.micro_batch_size
        if self.processes == 1:  # no other one waits
            return torch.arange(place * size, (place + 1) * size)
        blocks = Blocks.of(self.config.data.sequence_length, self.block_size(step))
        levels = self.levels(step, train.global_batch_size, blocks).mean(-1)
        return deal_rows(levels, self.accumulation * self.processes)[place]

    def __getitem__(self, index: int) -> Batch | CleanBatch:
        step, micro_step = divmod(index, self.accumulation)
        return self.batch(step, self.slots(step, micro_step))

    def batch(self, step: int, slots: Tensor) -> Batch | CleanBatch:
        """Return the rows of some slots of a step's global batch."""
        samples = step * self.config.train.global_batch_size + slots
        batch = self._corrupted(step, slots, samples)
        if not self.config.model.conditions_itself:
            return batch
        chosen = uniforms(self.config.run.seed, Stream.FIRST_PASS, row=samples) < 0.5  # [B]
        rows = chosen.repeat(len(batch.x0) // len(slots)).nonzero().squeeze(1)  # under each mask
        if isinstance(batch, CleanBatch):
            return replace(batch, first_rows=rows)
        return batch.self_conditioned(rows, self.config.train.compile)

    def _corrupted(self, step: int, slots: Tensor, samples: Tensor) -> Batch | CleanBatch:
        family = self.family.with_block_size(self.block_size(step))
        if isinstance(self.sequences, AnswerSequences):
            return self._answers(family, step, slots)
        x0, ids = self.rows(samples)
        blocks = family.blocks(x0.shape[1])
        v = self.levels(step, self.config.train.global_batch_size, blocks)[slots]
        if family.learned is not None:
            pair = [self._uniforms(s, samples) for s in (Stream.POSITION, Stream.PAIR)]
            uniforms = NoiseUniforms(v.repeat(2, 1), torch.cat(pair))
            return CleanBatch(x0, uniforms, ids, family.block_size)
        uniforms = self.uniforms(family, samples, v)
        in_pairs = self.config.diffusion.noise.complementary
        maker = self.maker(family, self.ranges[family.block_size], in_pairs)
        prompts = self.prompts(samples, blocks)
        given = None if prompts is None else ~prompts.given
        noise = draw_noise(family, x0, uniforms, maker, given)
        if in_pairs:  # two masks of every row
            x0, ids = x0.repeat(2, 1), None if ids is None else ids.repeat(2, 1)
            prompts = None if prompts is None else prompts.repeated(2)
        if prompts is None:
            return corrupt(family, x0, noise, ids)
        return prompts.hide(corrupt(family, x0, noise, ids), family.process.mask_token_id)

    def _answers(self, family: Family, step: int, slots: Tensor) -> Batch:
        """Return rows of conversations, whose prompts have no noise and no loss.

        The loss is shared among the answer tokens of all rows of the step. So it does not depend on
        how these are divided among processes and micro-batches.
        """
        sequences, global_batch = self.sequences, self.config.train.global_batch_size
        assert isinstance(sequences, AnswerSequences)
        first, whole = step * global_batch, family.block_size is None
        samples = first + slots
        rows = sequences.rows(samples.tolist(), whole)
        x0, answers = torch.from_numpy(rows.tokens), torch.from_numpy(rows.scored)  # [B, L]
        ids = torch.from_numpy(rows.documents) if sequences.packed else None
        v = self.levels(step, global_batch, family.blocks(x0.shape[1]))[slots]
        in_pairs = self.config.diffusion.noise.complementary
        maker = self.maker(family, self.ranges[family.block_size], in_pairs)
        noise = draw_noise(family, x0, self.uniforms(family, samples, v), maker, answers)
        tokens = sequences.answer_tokens(range(first, first + global_batch), whole)
        masks = 2 if in_pairs else 1
        x0, answers = x0.repeat(masks, 1), answers.repeat(masks, 1)
        ids = None if ids is None else ids.repeat(masks, 1)
        share = masks * tokens / (self.accumulation * self.processes)
        return replace(corrupt(family, x0, noise, ids), answers=answers, answer_tokens=share)

    def prompts(self, samples: Tensor, blocks: Blocks) -> Prompts | None:
        """Draw the prompts of some samples; None where no sample has one."""
        settings = self.config.diffusion.noise
        if not settings.prompts:
            return None
        row, position = samples[:, None], torch.arange(3)
        u = uniforms(self.config.run.seed, Stream.PROMPT, row=row, position=position)
        return Prompts.draw(u, blocks, settings.prompts, settings.prompt_dropout)

    def scored_tokens(self, batch: Batch | CleanBatch) -> float:
        """Return the expected number of a micro-batch's tokens that are scored: all but prompts."""
        if isinstance(batch, Batch) and batch.answer_tokens is not None:
            return batch.answer_tokens
        blocks = Blocks.of(self.config.data.sequence_length, batch.block_size)
        return scored_share(blocks, self.config.diffusion.noise.prompts) * batch.x0.numel()

    def block_size(self, step: int) -> int | None:
        """Return the block size of a step, each of those listed equally often."""
        sizes = self.config.diffusion.block_sizes
        u = float(uniforms(self.config.run.seed, Stream.BLOCK_SIZE, step=step))
        return sizes[int(u * len(sizes))]

    def rows(self, samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return [B, L] clean tokens of some samples, and document ids for `document_mask`."""
        assert not isinstance(self.sequences, AnswerSequences)
        rows = self.sequences.rows(samples.tolist())
        ids = torch.from_numpy(rows.documents) if self.config.data.document_mask else None
        return torch.from_numpy(rows.tokens), ids

    def levels(self, step: int, rows: int, blocks: Blocks, seed: int | None = None) -> Tensor:
        """Draw [rows, blocks] uniforms of the noise levels, stratified over all of them."""
        seed = self.config.run.seed if seed is None else seed
        return level_uniforms(seed, step, rows * blocks.count).view(rows, blocks.count)

    def maker(self, family: Family, rates: Rates = ALL_RATES, in_pairs: bool = False) -> NoiseMaker:
        """Return what makes the noise of a family, between two mask rates; see `training_maker`."""
        return training_maker(family, self.config.diffusion.noise.draw, rates, in_pairs)

    def uniforms(
        self, family: Family, samples: Tensor, levels: Tensor, seed: int | None = None
    ) -> NoiseUniforms:
        """Return the uniforms of some samples' noise.

        Args:
            family: its process says whether tokens are drawn.
            samples: [B] global indices of the rows.
            levels: [B, blocks] uniforms of the noise levels.
            seed: of the positions; None: the run's.
        """
        position = self._uniforms(Stream.POSITION, samples, seed)
        replaces_tokens = family.process.replaces_tokens
        token = self._uniforms(Stream.TOKEN, samples, seed) if replaces_tokens else None
        return NoiseUniforms(levels, position, token)

    def _uniforms(self, stream: Stream, samples: Tensor, seed: int | None = None) -> Tensor:
        """Draw [B, L] uniforms of the samples' positions."""
        seed = self.config.run.seed if seed is None else seed
        positions = torch.arange(self.config.data.sequence_length)
        return uniforms(seed, stream, row=samples[:, None], position=positions)

    def loader(self, first_step: int, steps: int) -> Generator[Batch | CleanBatch]:
        """Yield micro-batches from `first_step` up to `steps`, prepared by the configured workers.

        Those prepared ahead are made again when `ranges` changes. The workers end when the
        generator is closed.
        """
        number, stop = first_step * self.accumulation, steps * self.accumulation
        while number < stop:
            made_under = dict(self.ranges)
            batches = self._prepared(range(number, stop))
            try:
                while number < stop and self.ranges == made_under:
                    number += 1
                    yield self._fetched(batches)
            finally:
                del batches

    def _fetched(self, batches: Iterator[Batch | CleanBatch]) -> Batch | CleanBatch:
        try:
            with report_lost_worker(self.config.data.num_workers):
                return next(batches)
        except BaseException as error:
            # Frames that an error keeps hold the workers, and a process that ends waits for these.
            link: BaseException | None = error
            while link is not None:
                traceback.clear_frames(link.__traceback__)
                link = link.__context__
            raise

    def _prepared(self, numbers: range) -> Iterator[Batch | CleanBatch]:
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=numbers,
            num_workers=self.config.data.num_workers,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
        )
        with _own_signals():
            return iter(loader)


@contextmanager
def report_lost_worker(workers: int) -> Iterator[None]:
    """Report the end of a data-loader worker while a batch is fetched.

    Args:
        workers: how many there are.

    Raises:
        LostProcessError: in place of the error of torch or of the connection to the worker.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        ended = "DataLoader worker (pid" in str(error) or not isinstance(error, RuntimeError)
        # What a worker raised itself is passed on as "Caught …".
        if not workers or not ended or str(error).startswith("Caught "):
            raise
        raise LostProcessError(
            "a data-loader worker ended unexpectedly, perhaps because memory or shared memory "
            "ran out; start the same command again to continue from the last checkpoint, with a "
            f"smaller data.num_workers if it happens again{guard_hint()}"
        ) from None


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep torch from raising anywhere when a worker ends: fetching notices it, too."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _start_worker(worker: int) -> None:
    """Leave to the training process what concerns both.

    Ctrl-C, SIGTERM and SIGHUP, also where a whole group receives them: it still needs batches to
    reach the step at which all processes stop; workers end with it. And its own end: where it is
    killed while it fetches a batch, the worker's server of batches has no reader left.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    before = sys.excepthook

    def report(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            before(kind, error, trace)

    sys.excepthook = report
