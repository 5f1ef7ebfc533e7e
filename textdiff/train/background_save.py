"""Writing of checkpoints: at once where processes hold copies, in the background where they shard.

A sharded checkpoint is copied to the CPU, then a thread of each process writes and hashes the
file of that process while training continues. The main process exports in its thread, too. The
threads exchange nothing with each other: when all have ended, the processes meet between two
steps, and the main one renames the folder.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from textdiff.errors import CheckpointError, first_line
from textdiff.storage import PARTIAL, flush, whole_file, whole_folder
from textdiff.train.checkpoint import (
    SHARDED_FORMAT,
    STATE,
    Checkpoint,
    describe_file,
    discard_old,
    rescue,
    write_manifest,
)
from textdiff.train.distributed import TIMEOUT, on_main
from textdiff.train.shard_files import (
    ShardPlan,
    TensorShard,
    named_tensors,
    shard_name,
    write_groups,
)

_PATIENCE = 5.0  # seconds for other processes to end what they write, once this one has an error
_PAUSE = 0.05


class CheckpointSaver:
    """Checkpoints that the main process writes whole, before the run goes on.

    Args:
        root: the folder of the run's checkpoints.
        keep: number of checkpoints kept.
        accelerator: the processes; they call every method together.
    """

    def __init__(self, root: Path, keep: int, accelerator: Accelerator):
        self.root, self.keep, self.accelerator = root, keep, accelerator

    def save(self, checkpoint: Checkpoint, export: Callable[[], None]) -> None:
        """Write a checkpoint, then the export that belongs to it.

        Args:
            checkpoint: the tensors and counters of this step.
            export: writes the export, in the main process.

        Raises:
            CheckpointError: one of them, or of those before, cannot be written.
        """

        def write() -> None:
            checkpoint.save(self.root, self.keep)
            export()

        on_main(self.accelerator, write)

    def poll(self) -> None:
        """Complete a checkpoint of which everything is written; wait for nothing.

        Raises:
            CheckpointError: it cannot be written.
        """

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            CheckpointError: it cannot be written.
        """

    @contextmanager
    def outlasting_errors(self) -> Iterator[None]:
        """Complete what is being written also after an error; a second Ctrl-C does not wait."""
        try:
            yield
        except Exception:
            self._settle_alone()
            raise

    def _settle_alone(self) -> None:
        """Wait without the other processes, which may be gone."""


@dataclass
class _Write:
    """Checkpoint on its way: the thread of this process, and the folder that main renames."""

    shard: TensorShard
    file: Path
    place: ExitStack
    export: Callable[[], None] | None
    failure: str | None = None
    export_error: Exception | None = None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # A second Ctrl-C ends the process; the thread must not hold it.
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.shard.write(self.file)
            flush(self.file)
            with whole_file(record_of(self.file)) as record:
                record.write_text(json.dumps(describe_file(self.file)))
        except Exception as error:  # the main thread reports it
            self.failure = getattr(error, "strerror", None) or first_line(error)
            return
        try:
            if self.export is not None:
                self.export()
        except Exception as error:
            self.export_error = error


def record_of(file: Path) -> Path:
    """Return the place for size and hash of a shard, which say that it is complete."""
    return file.with_suffix(".json")


class ShardedSaver(CheckpointSaver):
    """Sharded checkpoints, written in the background; one at a time."""

    def __init__(self, root: Path, keep: int, accelerator: Accelerator):
        super().__init__(root, keep, accelerator)
        # Of CPUs: as the vote on signals, it waits for no device and notices a death at once.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._plan = ShardPlan(self._group)
        self._write: _Write | None = None

    @property
    def pending(self) -> bool:
        """Return whether a checkpoint is on its way."""
        return self._write is not None

    def save(self, checkpoint: Checkpoint, export: Callable[[], None]) -> None:
        """Copy a checkpoint to the CPU and begin to write it; the export follows it."""
        self.settle()
        target = self.root / f"step-{checkpoint.state['step']:06d}"
        folder, place = target.with_name(PARTIAL + target.name), ExitStack()
        on_main(self.accelerator, lambda: self._open(checkpoint, target, place))
        shard = self._plan.copy(named_tensors(checkpoint))
        file = folder / self._names()[self.accelerator.process_index]
        later = export if self.accelerator.is_main_process else None
        self._write = _Write(shard, file, place, later)

    def poll(self) -> None:
        """Complete the checkpoint once all processes have written, or one has failed."""
        if self._write is None:
            return
        state = [self._write.thread.is_alive(), self._write.failure is not None]
        ballot = torch.tensor(state, dtype=torch.int32)
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)
        writing, failed = ballot.tolist()
        if failed or not writing:
            self.settle()

    def settle(self) -> None:
        """Wait for all processes, then rename the folder."""
        write = self._write
        if write is None:
            return
        write.thread.join()
        failures: list[str | None] = [None] * self.accelerator.num_processes
        dist.all_gather_object(failures, write.failure, group=self._group)
        failure, self._write = next(filter(None, failures), None), None
        on_main(self.accelerator, lambda: self._complete(write, failure))

    def _settle_alone(self) -> None:
        """Wait for this process, then a while for the files of the others."""
        write, self._write = self._write, None
        if write is None:
            return
        write.thread.join()
        if not self.accelerator.is_main_process:
            return
        records = [record_of(write.file.with_name(name)) for name in self._names()]
        now = time.monotonic()
        deadline = now + _PATIENCE + (now - write.begun)
        while not all(record.exists() for record in records) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        with suppress(CheckpointError):  # another error is on its way to the user
            self._complete(write, write.failure)

    def _names(self) -> list[str]:
        processes = self.accelerator.num_processes
        return [shard_name(process, processes) for process in range(processes)]

    def _open(self, checkpoint: Checkpoint, target: Path, place: ExitStack) -> None:
        """Make the folder that takes the place of `target` when `place` closes."""
        folder = place.enter_context(whole_folder(target, rescue(self.root)))
        try:
            write_groups(checkpoint, folder)
            (folder / STATE).write_text(json.dumps(checkpoint.state, indent=2) + "\n")
        except OSError as error:
            place.__exit__(type(error), error, error.__traceback__)  # raises what is reported

    def _complete(self, write: _Write, failure: str | None) -> None:
        with write.place:
            if failure is not None:
                raise OSError(0, failure)
            folder, known = write.file.parent, {}
            for name in self._names():
                record = record_of(folder / name)
                known[name] = json.loads(record.read_text())
                record.unlink()
            write_manifest(folder, SHARDED_FORMAT, known, shards=len(known))
        discard_old(self.root, self.keep)
        if write.export_error is not None:
            raise write.export_error
