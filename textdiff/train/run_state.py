"""State that a run continues from: weights, their averages, optimizers and counters."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from textdiff.config import Config
from textdiff.data.corpus import Corpus
from textdiff.diffusion.family import Family
from textdiff.errors import CheckpointError
from textdiff.export.adapter_folder import AdapterBase, write_adapters
from textdiff.export.adapters import (
    frozen_parameters,
    merged_adapters,
    merged_size,
    trained_parameters,
)
from textdiff.export.loading import family_of
from textdiff.export.records import write_export
from textdiff.likelihood.bound import Bound
from textdiff.models import Denoiser
from textdiff.pipeline import TextDiffusion
from textdiff.train.background_save import CheckpointSaver, ShardedSaver
from textdiff.train.batches import TrainingBatches
from textdiff.train.checkpoint import (
    Checkpoint,
    is_sharded_checkpoint,
    read_state,
    rescue,
)
from textdiff.train.distributed import (
    gather,
    is_sharded,
    load_optimizer,
    load_tensors,
    materialized,
    meta_copy,
)
from textdiff.train.setup import check_resume, sample_defaults
from textdiff.train.shard_files import load_shards


@dataclass
class Progress:
    """Counters that a checkpoint carries.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        losses: training loss of each step since the last log line. The last bit of a sum would
            depend on where an interruption cut it.
        bound_step: step of the newest validation bound; -1: none yet.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    bound_step: int = -1


class RunState:
    """State of a run, which checkpoints save and restore; all processes call it together.

    Attributes:
        trained: the network that is trained.
        ema: its averaged weights.
        exported: the model that is measured and exported; holds the averages inside `averaged`.
        saver: writes the checkpoints.
        progress: the counters.
        bound: the newest validation bound.

    Args:
        config: the run's config.
        corpus: the prepared corpus.
        accelerator: the processes of the run.
        model: the network and its family.
        optimizers: those that `Accelerator.prepare` returned.
        batches: the training batches, whose mask rates may be searched.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        accelerator: Accelerator,
        model: tuple[Denoiser, Family],
        optimizers: Sequence[Optimizer],
        batches: TrainingBatches,
    ):
        self.config, self.corpus, self.accelerator = config, corpus, accelerator
        self.optimizers, self.batches = optimizers, batches
        self.directory = Path(config.run.dir)
        self.checkpoints = self.directory / "checkpoints"
        self.trained, family = network, _ = model
        self.ema = EMA(network, config.train.ema_decay)
        self.sharded = is_sharded(network)
        saver = ShardedSaver if self.sharded else CheckpointSaver
        self.saver = saver(self.checkpoints, config.train.keep_checkpoints, accelerator)
        if self.sharded:
            network = meta_copy(network, config.train.lora)
            family = family_of(network.config, accelerator.device, network.exponents)
        network.cuda_graphs = False  # samples are few, and what they record takes memory
        self.exported = TextDiffusion(network, corpus.tokenizer, family, sample_defaults(config))
        # Exports of sharded weights are written in the background, while `exported` is measured.
        self.written = deepcopy(self.exported) if self.sharded else self.exported
        self.base = _base(config)
        self.progress = Progress()
        self.bound: Bound | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """Put the averaged weights into `exported` while entered."""
        if self.sharded:
            whole = {**frozen_parameters(self.trained), **self.ema.state_dict()}
            return materialized(self.exported.model, whole)
        return self.ema.applied(self.trained)

    def save(self) -> None:
        """Write a checkpoint and the export that belongs to it; sharded ones in the background."""
        self.saver.settle()  # before the next averages need memory
        parameters = {n: p.detach() for n, p in trained_parameters(self.trained).items()}
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        checkpoint = Checkpoint(parameters, self.ema.state_dict(), states, self._record())
        self.saver.save(checkpoint, self._export())

    def _record(self) -> dict[str, Any]:
        return {
            **vars(self.progress),
            "ema_updates": self.ema.updates,
            "bound": None if self.bound is None else asdict(self.bound),
            "noise_ranges": list(self.batches.ranges.items()),
            "parameters": self.parameters,
            "vocabulary": self.exported.model.config.vocab_size,
            "corpus": self.corpus.record,
            "config": self.config.model_dump(mode="json"),
            **({} if self.base is None else {"base_sha256": self.base.sha256}),
        }

    @property
    def parameters(self) -> int:
        """Number of parameters of the exported network."""
        return merged_size(self.trained)

    def _export(self) -> Callable[[], None]:
        """Return the action by which the main process exports the averages of this step."""
        weights: Callable[[], AbstractContextManager[None]] = self.averaged
        if self.sharded:
            averages = {**frozen_parameters(self.trained), **self.ema.state_dict()}
            whole = gather(averages, keep=self.accelerator.is_main_process)
            weights = partial(materialized, self.written.model, whole)
        target, record, bound = self.directory / "export", self._record(), self.bound

        def export() -> None:
            with weights():
                saved = rescue(self.checkpoints)
                write_export(target, self._write, self.config, record, bound, saved)

        return export

    def _write(self, folder: Path) -> None:
        """Write the exported model: merged, or its adapters alone where the config says so."""
        lora = self.config.train.lora
        if lora is None or lora.merge:
            with merged_adapters(self.written.model):
                self.written.save_pretrained(folder)
        else:
            assert self.base is not None
            write_adapters(self.written, folder, lora, self.base)

    def restore(self, path: Path) -> None:
        """Load a checkpoint, of which `choose_checkpoint` has checked the files.

        Args:
            path: its folder.

        Raises:
            CheckpointError: it does not fit the config.
        """
        record = read_state(path)
        check_resume(self.config, self.corpus.record, record, self.directory)
        if self.base is not None and record["base_sha256"] != self.base.sha256:
            raise CheckpointError(
                f"train.init_from {self.config.train.init_from} holds other weights than those "
                f"that the adapters in {self.directory} were trained on; restore them, choose "
                "another run.dir, or start over with --resume never",
                code="other_base",
            )
        parameters, averages = trained_parameters(self.trained), self.ema.state_dict()
        if is_sharded_checkpoint(path):
            load_shards(path, parameters, averages, self.optimizers)
        else:
            whole = Checkpoint.read(path)
            load_tensors(parameters, whole.model)
            load_tensors(averages, whole.ema)
            for optimizer, state in zip(self.optimizers, whole.optimizers, strict=True):
                load_optimizer(optimizer, state)
        self.ema.updates = record["ema_updates"]
        self.progress = Progress(**{name: record[name] for name in vars(self.progress)})
        if record["bound"] is not None:
            self.bound = Bound(**record["bound"])
        self.batches.ranges = {size: tuple(rates) for size, rates in record["noise_ranges"]}


def _base(config: Config) -> AdapterBase | None:
    """Return the reference to the weights that adapters are trained on; None: all are trained."""
    start = config.train.init_from
    return AdapterBase.of(start) if config.train.lora and start else None


class EMA:
    """Averaged parameters, float32, of those that are trained.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so early averages do not remember the
    initialisation. A decay of 0 follows the weights themselves. Averages of sharded parameters are
    sharded like them.

    Args:
        model: whose parameters are averaged.
        decay: final decay.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        parameters = trained_parameters(model)
        self.names = list(parameters)
        self.shadow = [p.detach().clone() for p in parameters.values()]
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach() for p in trained_parameters(model).values()]
        torch._foreach_lerp_(self.shadow, current, 1.0 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model, in evaluation mode, while entered."""
        parameters = list(model.parameters())
        # Frozen ones, too: generation may store their values in another order.
        kept = [p.data for p in parameters]
        training = model.training
        model.eval()
        try:
            for parameter, average in zip(
                trained_parameters(model).values(), self.shadow, strict=True
            ):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data
            model.train(training)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.shadow, strict=True))
