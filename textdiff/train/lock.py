"""One process that writes in a directory, by a lock of the operating system.

A record lock (`fcntl.lockf`) ends with the process that holds it, however that dies, and, unlike
`flock`, is not inherited by data-loader workers that outlive it for seconds. What the file says
about its holder is only for people. Python knows no such lock on Windows: nothing is locked there.
"""

import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from textdiff.errors import CheckpointError

NAME = ".lock"


class RunLock:
    """While entered, this process alone works in a directory, which it creates.

    Args:
        directory: the run's.
        name: what users call it.
        works: what a process does there.

    Raises:
        CheckpointError: another process works there, or it cannot be written.
    """

    def __init__(self, directory: Path, name: str = "run.dir", works: str = "trains"):
        self.directory, self.name, self.works = directory, name, works
        self._file: int | None = None

    def __enter__(self) -> "RunLock":
        path = self.directory / NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(
                f"cannot write in {self.name} {self.directory} ({error.strerror}); choose a "
                f"{self.name} that can be written"
            ) from None
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):
            held = _holder(os.pread(file, 4096, 0))
            os.close(file)
            raise CheckpointError(
                f"another process {self.works} in {self.directory}: {held}; let it finish, stop it "
                f"(it saves first), or choose another {self.name}"
            ) from None
        except OSError as error:
            os.close(file)
            raise CheckpointError(
                f"{path} cannot be locked ({error.strerror}), so a second run could not be kept "
                "out; choose a place on a file system with locks"
            ) from None
        self._file = file
        with suppress(OSError):  # on a full disk the lock holds, it only cannot say whose it is
            os.ftruncate(file, 0)
            os.pwrite(file, _me().encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _me() -> str:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n"


def _holder(content: bytes) -> str:
    """Who holds the lock, in words."""
    try:
        found = json.loads(content)
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "its name is not in the lock file"
