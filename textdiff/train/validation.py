"""Validation of the averaged weights: bounds, mask rates of small variance, samples."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from textdiff.config import Config
from textdiff.data.conversation_rows import messages_of
from textdiff.data.corpus import Corpus
from textdiff.export.loading import DTYPES
from textdiff.likelihood.answer_windows import answer_windows
from textdiff.likelihood.bound import Bound
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.scored_texts import scored_pieces, windows_of
from textdiff.likelihood.windows import Windows
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Generation
from textdiff.sampling.template import quoted
from textdiff.train.batches import TrainingBatches
from textdiff.train.ranges import RangeChoice, search_range
from textdiff.train.reporter import Reporter


class Abandoned(Exception):
    """End of a measurement by a signal; nothing of it is kept.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = number


class Validation:
    """Measurements of a run between steps; all processes call it together.

    Attributes:
        texts: held-out texts that are scored.
        signalled: returns the number of a signal that asks the run to stop, or 0, the same in all
            processes, which ask it together.

    Args:
        config: the run's config.
        corpus: the prepared corpus.
        model: holds the averaged weights whenever something is measured.
        accelerator: the processes that share the work.
        reporter: receives progress and samples.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        model: TextDiffusion,
        accelerator: Accelerator,
        reporter: Reporter,
    ):
        self.config, self.model = config, model
        self.accelerator, self.reporter = accelerator, reporter
        self.signalled: Callable[[], int] = lambda: 0
        self.texts = corpus.validation[: config.evaluate.max_documents]
        self.windows = {size: self._windows(corpus, size) for size in config.diffusion.block_sizes}

    def _windows(self, corpus: Corpus, block_size: int | None) -> Windows:
        """Return the windows of the held-out texts; those of conversations depend on blocks."""
        length, conversations = self.config.data.sequence_length, self.config.data.conversations
        if conversations is not None:
            return answer_windows(
                corpus.tokenizer, self.texts, length, block_size, conversations.too_long
            )
        clean = self.model.family.process.vocabulary.clean.cpu()
        return windows_of(corpus.tokenizer, scored_pieces(self.texts), length, clean)

    def measure(
        self, batches: TrainingBatches, step: int
    ) -> tuple[dict[int | None, Bound], dict[int | None, RangeChoice]]:
        """Return bounds in every block size that is trained, and the mask rates that are searched.

        Also draws samples, if the config asks for them.

        Raises:
            Abandoned: `signalled`.
        """
        sizes = self.config.diffusion.block_sizes
        with torch.autocast(
            self.accelerator.device.type,
            DTYPES["bfloat16"],
            enabled=self.config.evaluate.dtype == "bfloat16",
        ):
            bounds = {size: self.bound(size) for size in sizes}
            searched = sizes if self.config.diffusion.noise.range == "search" else ()
            choices = {size: self.search(batches, step, size) for size in searched}
            if self.accelerator.is_main_process and self.config.sample.num_samples:
                self.sample(step)
        return bounds, choices

    def bound(self, block_size: int | None) -> Bound:
        """Return the validation bound, under common random numbers."""
        return estimate(
            self.model.model,
            self.model.family.with_block_size(block_size),
            self.windows[block_size],
            seed=self.config.run.seed,
            replicates=self.config.evaluate.replicates,
            shard=self._shard,
            reduce=self._sum,
            progress=self._progressed,
        ).bound()

    def search(self, batches: TrainingBatches, step: int, block_size: int | None) -> RangeChoice:
        """Return the mask rates of smallest variance at a step."""
        family = self.model.family.with_block_size(block_size)
        return search_range(
            self.model.model, family, batches, step, shard=self._shard, reduce=self._sum
        )

    def sample(self, step: int) -> None:
        """Write samples into `samples/` and the trackers; for the main process."""
        drawn = self._drawn()
        folder = Path(self.config.run.dir) / "samples"
        folder.mkdir(exist_ok=True)
        text = "\n\n---\n\n".join(drawn.texts)
        (folder / f"step-{step:06d}.txt").write_text(text + "\n", encoding="utf-8")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_text("samples", text, step)
        self.reporter.sampled(step, drawn.texts)

    def _drawn(self) -> Generation:
        """Return texts from nothing, or answers to the first prompts that are held out."""
        count, seed = self.config.sample.num_samples, self.config.run.seed
        if self.config.data.conversations is None:
            return self.model.generate("", num_samples=count, seed=seed)
        rows = [messages_of(json.loads(text), "held out") for text in self.texts[:count]]
        asked = [row[: [m.role for m in row].index("assistant")] for row in rows]
        if self.model.tokenizer.chat_template:
            reader = self.model.chat_reader()
            return self.model.generate([reader.prompt(messages) for messages in asked], seed=seed)
        return self.model.generate([quoted(messages[0].content) for messages in asked], seed=seed)

    @property
    def _shard(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _sum(self, values: Tensor) -> Tensor:
        """Return values of the CPU, added over processes."""
        self._obey()
        moved = values.to(self.accelerator.device)
        return torch.as_tensor(self.accelerator.reduce(moved, "sum")).cpu()

    def _progressed(self, done: int, total: int) -> None:
        self.reporter.evaluating(done, total)
        if self.accelerator.num_processes == 1:  # several make unequally many network calls
            self._obey()

    def _obey(self) -> None:
        if number := self.signalled():
            raise Abandoned(number)
