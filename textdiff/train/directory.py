"""The directory of a run: new, empty, or an earlier run's; never one with files of others."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from textdiff.data.plain_data import read_yaml
from textdiff.errors import CheckpointError, ConfigError
from textdiff.train.files import OLD, PARTIAL
from textdiff.train.lock import NAME as LOCK
from textdiff.train.lock import RunLock

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
# What a run writes. A run that was killed early has some of it.
OWN = {
    LOCK,
    CHECKPOINTS,
    METRICS,
    "config.yaml",
    "env.json",
    "validation.jsonl",
    "samples",
    "export",
    "tensorboard",
    "divergence.json",
}
# What file managers and version control leave in a folder that is empty to its user.
BLANK = {".DS_Store", ".gitkeep", ".gitignore"}
SHOWN = 3


def claim(directory: Path, resume: str, report: Callable[[str], None], stack: ExitStack) -> None:
    """Make a directory this run's, until the stack unwinds; `never` begins with an empty one.

    Args:
        directory: the run's.
        resume: `auto`, `never` or a checkpoint's path.
        report: receives what was done with an earlier run.
        stack: holds the lock.

    Raises:
        ConfigError: the directory holds files of others, or an earlier run cannot be moved.
        CheckpointError: another process trains there, or it cannot be written.
    """
    refuse_others(directory)
    stack.enter_context(RunLock(directory))
    if resume == "never" and _set_aside(directory, report):
        stack.enter_context(RunLock(directory))


def refuse_others(directory: Path) -> None:
    """Stop at a directory whose files are not those of a run.

    Raises:
        ConfigError: it holds what no run wrote.
        CheckpointError: it is a file, or cannot be read.
    """
    try:
        names = set(os.listdir(directory))
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(
            f"cannot write in run.dir {directory} ({error.strerror}); choose a run.dir that can be "
            "written"
        ) from None
    if _is_run(directory, names):
        return
    others = sorted(name for name in names - BLANK if not _own(name) or LOCK not in names)
    if others:
        listed = ", ".join(others[:SHOWN]) + (", …" if len(others) > SHOWN else "")
        raise ConfigError(
            f"run.dir {directory} holds files that are not a run's ({listed}); name a new or empty "
            f"folder, such as runs/NAME"
        )


def _is_run(directory: Path, names: set[str]) -> bool:
    """Whether a run has begun there: its resolved config is beside what it has written."""
    if "config.yaml" not in names or not names & {"env.json", METRICS, CHECKPOINTS}:
        return False
    try:
        config = read_yaml(directory / "config.yaml", "config.yaml")
    except ConfigError:
        return False
    return isinstance(config, dict) and set(config) >= {"run", "data", "diffusion", "train"}


def _own(name: str) -> bool:
    return name in OWN or name.startswith((PARTIAL, OLD))


def _set_aside(directory: Path, report: Callable[[str], None]) -> bool:
    """Move an earlier run out of the way instead of deleting it; return whether there was one.

    Raises:
        ConfigError: it cannot be moved.
    """
    if not (directory / CHECKPOINTS).exists() and not (directory / METRICS).exists():
        return False
    place = Path(os.path.abspath(directory))
    if Path.cwd().is_relative_to(place.resolve()):
        raise ConfigError(
            f"--resume never would move the earlier run in {directory} aside, and that is the "
            "current folder; change to another folder, or choose another run.dir"
        )
    number = 1
    while (aside := place.with_name(f"{place.name}.old-{number}")).exists():
        number += 1
    try:
        place.rename(aside)
    except OSError as error:
        raise ConfigError(
            f"--resume never cannot move the earlier run in {directory} to {aside} "
            f"({error.strerror}); choose another run.dir"
        ) from None
    shown = aside if directory.is_absolute() else Path(os.path.relpath(aside))
    report(f"moved the earlier run to {shown}")
    return True
