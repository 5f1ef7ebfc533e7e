"""The directory of a run: new, empty, or an earlier run's; never one with files of others."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from textdiff.data.plain_data import read_yaml
from textdiff.errors import CheckpointError, ConfigError
from textdiff.storage import OLD, PARTIAL

LOCK_NAME, CHECKPOINTS, METRICS = ".lock", "checkpoints", "metrics.jsonl"
# What a run writes. A run that was killed early has some of it.
OWN = {
    LOCK_NAME,
    CHECKPOINTS,
    METRICS,
    "config.yaml",
    "env.json",
    "validation.jsonl",
    "samples",
    "export",
    "tensorboard",
    "wandb",
    "trackers.json",
    "profile",
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
    stack.enter_context(run_lock(directory))
    if resume == "never" and _set_aside(directory, report):
        stack.enter_context(run_lock(directory))


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
    others = sorted(name for name in names - BLANK if not _own(name) or LOCK_NAME not in names)
    if others:
        listed = ", ".join(others[:SHOWN]) + (", …" if len(others) > SHOWN else "")
        raise ConfigError(
            f"run.dir {directory} holds files that are not a run's ({listed}); name a new or empty "
            f"folder, such as runs/NAME",
            code="foreign_files",
        )


def _is_run(directory: Path, names: set[str]) -> bool:
    """Return whether a run has begun there: its resolved config is beside what it has written."""
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
            "current folder; change to another folder, or choose another run.dir",
            code="current_folder",
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


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def run_lock(directory: Path, name: str = "run.dir", works: str = "trains") -> Iterator[None]:
    """Work alone in a directory, which is created, while entered.

    A record lock (`fcntl.lockf`) ends with the process that holds it, however that dies. Unlike
    `flock` it is not inherited by data-loader workers, which outlive that process for seconds. The
    file's content is for people only. Windows has no such lock in Python: nothing is locked there.

    Args:
        directory: the run's.
        name: what users call it.
        works: the verb for another process in the refusal.

    Raises:
        CheckpointError: another process works there, or it cannot be written.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(
            f"cannot write in {name} {directory} ({error.strerror}); choose a {name} that can be "
            "written"
        ) from None
    try:
        _lock(file, directory, name, works)
        with suppress(OSError):  # on a full disk the lock holds, it only cannot say whose it is
            os.ftruncate(file, 0)
            os.pwrite(file, _own_name().encode(), 0)
        yield
    finally:
        os.close(file)


def _lock(file: int, directory: Path, name: str, works: str) -> None:
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CheckpointError(
            f"another process {works} in {directory}: {_holder(os.pread(file, 4096, 0))}; let it "
            f"finish, stop it (it saves first), or choose another {name}",
            code="locked",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{directory / LOCK_NAME} cannot be locked ({error.strerror}), so a second run could "
            "not be kept out; choose a place on a file system with locks"
        ) from None


def _own_name() -> str:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"


def _holder(content: bytes) -> str:
    """Return the process that holds a lock, in words."""
    try:
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "its name is not in the lock file"
