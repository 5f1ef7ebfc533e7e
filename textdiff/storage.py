"""Files and folders on a disk: written whole or not at all, hashed, no git-lfs pointers.

A file or folder is called `.partial-NAME` until it is whole and renamed; a folder that it replaces
waits as `.old-NAME` until then. `sweep` removes what a kill left in between.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from textdiff.errors import CheckpointError, TextDiffError, first_line

PARTIAL, OLD = ".partial-", ".old-"

# How a system refuses to write: full, over a quota, too large, not allowed, broken.
_REFUSALS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO")
    if hasattr(errno, name)
}


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield the place to write a file at; on leaving, it takes the place of `target`."""
    scratch = target.with_name(PARTIAL + target.name)
    yield scratch
    scratch.replace(target)


@contextmanager
def whole_folder(target: Path, rescue: str) -> Iterator[Path]:
    """Yield an empty folder to write in; on leaving, it takes the place of `target`.

    Args:
        target: the folder's final place.
        rescue: what is left when writing fails, the end of that sentence.

    Raises:
        CheckpointError: the disk is full, not writable, …; `target` is what it was.
    """
    scratch = target.with_name(PARTIAL + target.name)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in (*scratch.iterdir(), scratch):
            flush(path)
        old = target.with_name(OLD + target.name)
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        reason = getattr(error, "strerror", None) or first_line(error)
        message = f"cannot write {target}: {reason}; {rescue}"
        raise CheckpointError(message, code="cannot_write") from error


@contextmanager
def report_failed_writes(directory: Path, rescue: Callable[[], str]) -> Iterator[None]:
    """Report where writing failed, which an error of the system may leave out.

    Args:
        directory: where everything is written.
        rescue: what is left then, the end of that sentence.

    Raises:
        CheckpointError: in place of an error about writing; others pass.
    """
    before = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if not _refused(failure.exc_value):  # raised once more by the next call of that writer
            before(failure)

    threading.excepthook = report
    try:
        yield
    except OSError as error:
        if not _refused(error):
            raise
        place = error.filename or f"in {directory}"
        message = f"cannot write {place}: {error.strerror}; {rescue()}"
        raise CheckpointError(message, code="cannot_write") from error
    finally:
        threading.excepthook = before


def _refused(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in _REFUSALS


def discard(folder: Path) -> None:
    """Delete a folder; a kill leaves it whole or out of sight."""
    doomed = folder.with_name(PARTIAL + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path) -> list[str]:
    """Remove what a killed process left half done in a folder; returns the names.

    A folder that was moved aside for a successor that never came is put back.
    """
    swept = []
    for path in sorted(root.glob(f"{OLD}*")):
        place = path.with_name(path.name.removeprefix(OLD))
        if place.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(place)
        swept.append(path.name)
    for path in sorted(root.glob(f"{PARTIAL}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
        swept.append(path.name)
    return swept


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


_START = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1024  # bytes of a pointer, by its specification


def file_hash(*paths: Path) -> str | None:
    """Return the SHA-256 of files' contents one after the other; None where one cannot be read."""
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    except OSError:
        return None
    return digest.hexdigest() if paths else None


def refuse_pointers(folder: Path, error: type[TextDiffError]) -> None:
    """Stop where a folder holds pointers instead of files.

    Args:
        folder: of a model or a tokenizer.
        error: what is raised.

    Raises:
        TextDiffError: of that kind, with the first pointer.
    """
    for path in sorted(folder.iterdir()):
        refuse_pointer(path, error)


def refuse_pointer(path: Path, error: type[TextDiffError]) -> None:
    """Stop where a file is a pointer; pipes and what does not exist are left alone.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        TextDiffError: of that kind.
    """
    if not path.is_file() or path.stat().st_size > _LARGEST:
        return
    with path.open("rb") as file:
        pointer = file.read(len(_START)) == _START
    if pointer:
        raise error(
            f"{path} is a git-lfs pointer, not the file itself; fetch the files with `git lfs "
            f"pull` in {path.parent}, or download them another way"
        )
