"""Choice of the checkpoint that a run continues from, which needs neither its corpus nor a network.

A damaged checkpoint, or one of another version, is thus refused before a corpus is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from textdiff.storage import sweep
from textdiff.train.checkpoint import checkpoints, damage, newest_usable, refuse_damaged
from textdiff.train.directory import CHECKPOINTS
from textdiff.train.distributed import on_main


@dataclass(frozen=True)
class Resumption:
    """Checkpoint that a run continues from, whose files have been checked.

    Attributes:
        path: its folder; None: the run begins with its first step.
    """

    path: Path | None


def choose_checkpoint(
    directory: Path,
    resume: str | Resumption,
    accelerator: Accelerator,
    report: Callable[[str], None],
) -> Resumption:
    """Choose the checkpoint of a run; all processes call it together.

    Args:
        directory: the run's.
        resume: `auto` (the newest usable checkpoint), `never`, a checkpoint's path, or what this
            function has returned.
        accelerator: the processes, each of which hashes its share of the files.
        report: receives what was done with damaged or unfinished checkpoints, on the main process.

    Raises:
        CheckpointError: it is damaged, all are, or another version of textdiff wrote it.
    """
    if isinstance(resume, Resumption):
        return resume

    def say(text: str) -> None:
        if accelerator.is_main_process:
            report(text)

    def problem(path: Path) -> str | None:
        own = damage(path, accelerator.process_index, accelerator.num_processes)
        return next(filter(None, gather_object([own])), None)

    saved = on_main(accelerator, lambda: _saved(directory, resume, report))
    if resume in ("auto", "never"):
        return Resumption(newest_usable(saved, say, problem))
    path = Path(resume)
    refuse_damaged(path, problem(path))
    return Resumption(path)


def _saved(directory: Path, resume: str, report: Callable[[str], None]) -> list[Path]:
    """Put in order what a kill left, and return the checkpoints that `resume` may choose."""
    root = directory / CHECKPOINTS
    for folder in (directory, root):
        for name in sweep(folder):
            report(f"put {folder / name} in order, which a kill left half done")
    return checkpoints(root) if resume == "auto" else []
