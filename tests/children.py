"""Processes that tests start: each in a session of its own, and none without an end.

A child that signals its own group cannot hit the tests, a signal for the tests' group does not hit
the child, and whatever it starts is found again by a mark in the environment, also when its parent
is gone. One that outlives its limit writes where each of its Python processes is, dies with all of
them, and fails the test with what it said.
"""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import psutil

LIMIT_SECONDS = 300.0  # many times what any child needs, on a busy machine too
FORKS = multiprocessing.get_context("fork")
_MARK = "TEXTDIFF_TEST_CHILD"


class Watch:
    """The end of one child and of everything that it starts.

    Attributes:
        environment: what the child has to be started with.
        late: whether its time was up.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        self.mark = uuid.uuid4().hex
        given = os.environ if environment is None else environment
        self.environment = {**given, _MARK: self.mark, "PYTHONFAULTHANDLER": "1"}
        self.late = False
        self._timer: threading.Timer | None = None

    def start(self, seconds: float) -> None:
        """Ends everything in so many seconds, unless `close` comes first."""
        self._timer = threading.Timer(seconds, self._time_is_up)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        """Kills what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._kill()

    def processes(self) -> list[psutil.Process]:
        """All processes with the mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(_MARK) == self.mark:
                    found.append(process)
        return found

    def _time_is_up(self) -> None:
        self.late = True
        for process in self.processes():  # faulthandler answers with the stacks of all threads
            _send(process, signal.SIGABRT)
            _send(process, signal.SIGCONT)
        self._wait(5)
        self._kill()

    def _kill(self) -> None:
        for process in self.processes():
            _send(process, signal.SIGKILL)
        self._wait(10)

    def _wait(self, seconds: float) -> None:
        """Until all are gone. Looks only: the exit codes are for whoever started them."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)


def _send(process: psutil.Process, number: int) -> None:
    with suppress(psutil.Error):  # psutil compares start times: never a stranger's number
        process.send_signal(number)


@contextmanager
def child(
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    seconds: float = LIMIT_SECONDS,
    stdout: int | IO[Any] | None = subprocess.PIPE,
    stderr: int | IO[Any] | None = subprocess.PIPE,
    cwd: str | Path | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """A child that runs beside the test and is gone, with all that it started, after the block.

    Args:
        words: the command.
        env: of the child; None: the tests'.
        seconds: its limit.
        stdout: where it writes, as `subprocess.Popen` has it.
        stderr: the same.
        cwd: where it runs; None: where the tests do.

    Raises:
        AssertionError: it was still there when its time was up.
    """
    watch = Watch(env)
    process = subprocess.Popen(
        [str(word) for word in words],
        env=watch.environment,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
        cwd=cwd,
    )
    watch.start(seconds)
    try:
        with process:
            try:
                yield process
            finally:
                watch.close()
    finally:
        assert not watch.late, f"{words} did not end within {seconds} s"


def wait_until(process: subprocess.Popen[str], come: Callable[[], bool]) -> None:
    """Returns when something that a child does has come, however busy the machine is.

    Raises:
        AssertionError: the child ended before, by itself or because its time was up.
    """
    while not come():
        assert process.poll() is None, f"ended with {process.returncode} before it had come"
        time.sleep(0.05)


def finished(
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    seconds: float = LIMIT_SECONDS,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; its output is kept.

    Args:
        words: the command.
        env: of the child; None: the tests'.
        seconds: its limit.
        cwd: where it runs; None: where the tests do.

    Raises:
        AssertionError: it was still there when its time was up; with what it had said.
    """
    said = "", ""
    try:
        with child(words, env=env, seconds=seconds, cwd=cwd) as process:
            said = process.communicate(timeout=seconds + 30.0)
            code = process.wait()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{said[0]}\n{said[1]}") from None
    return subprocess.CompletedProcess(list(words), code, *said)


@contextmanager
def forks(*works: Callable[[], object], seconds: float = LIMIT_SECONDS) -> Iterator[None]:
    """Forks of the tests that run beside them: what they need is imported already, in seconds.

    They start no process themselves. Queues to them are made by `FORKS`.

    Args:
        works: what each of them does.
        seconds: their limit.

    Raises:
        AssertionError: one was still there when its time was up.
    """
    processes = [FORKS.Process(target=_in_a_session, args=(work,), daemon=True) for work in works]
    late = threading.Event()
    timer = threading.Timer(seconds, _end_late, (processes, late))
    for process in processes:
        process.start()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _end(processes)
    assert not late.is_set(), f"{works} did not end within {seconds} s"


def _in_a_session(work: Callable[[], object]) -> None:
    os.setsid()
    work()


def _end_late(processes: Sequence[BaseProcess], late: threading.Event) -> None:
    late.set()
    _end(processes)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(10)
