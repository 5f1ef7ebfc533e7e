"""Shared fixtures. One thread: the tensors here are small, and threads that wait for a busy core
cost more than they bring; processes share the tests instead."""

import faulthandler
import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import pytest
import torch
from filelock import FileLock

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """What tests and their children do about signals does not depend on who started pytest."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stderr, tests = os.dup(sys.stderr.fileno()), os.getpid()

    def end(number, frame):
        """A time limit from outside: say where it struck, and leave no child behind."""
        if os.getpid() != tests:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        where = f"SIGTERM in {os.environ.get('PYTEST_CURRENT_TEST', 'no test')}"
        os.write(stderr, f"{where}\n".encode())
        faulthandler.dump_traceback(stderr)
        if config.getoption("numprocesses", None):  # those who run the tests have the children
            ours = psutil.Process().children()
            for process in ours:
                process.terminate()
            psutil.wait_procs(ours, timeout=10)
        pytest.exit(where, 128 + number)

    signal.signal(signal.SIGTERM, end)
    # Children that hang are told to abort; what they say is enough.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def pytest_collection_finish():
    """Freeze imported objects, which full collections would visit for half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real corpora, where the machine has them."""
    folder = os.environ.get("TEXTDIFF_DATA")
    if not folder:
        pytest.skip("TEXTDIFF_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def documentation(tmp_path_factory, request) -> list[str]:
    """This Python's own prose. To parse it takes seconds: one worker does it for all."""
    from textdiff.data.python_docs import python_docs

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if hasattr(request.config, "workerinput") else folder
    path = folder / "documentation.json"
    with FileLock(folder / "documentation.lock"):
        if not path.exists():
            path.write_text(json.dumps(python_docs()))
    return json.loads(path.read_text())
