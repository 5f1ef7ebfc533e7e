"""Several processes agree, stop together and notice a death; killed runs go on bit for bit."""

import importlib.util
import os
import signal
import socket
import struct
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from multiprocessing import resource_sharer
from pathlib import Path
from subprocess import STDOUT

import psutil
import pytest
from accelerate import PartialState
from children import FORKS, Watch, child, finished, forks

import textdiff.train.distributed as processes
from textdiff.errors import DataError, LostProcessError
from textdiff.train.batches import _start_worker

pytestmark = pytest.mark.dist
AT_MOST_SECONDS = 20.0  # for a survivor to end; far below the timeout of half an hour


@pytest.fixture(autouse=True)
def ended(monkeypatch):
    """Whatever a test of this file starts ends with it."""
    watch = Watch()
    for name, value in watch.environment.items():
        monkeypatch.setenv(name, value)
    watch.start(240)
    yield
    watch.close()
    assert not watch.late


@pytest.fixture(scope="module")
def kill_loop():
    """`tests/manual/kill_loop.py` as a module."""
    path = Path(__file__).resolve().parents[1] / "manual" / "kill_loop.py"
    spec = importlib.util.spec_from_file_location("kill_loop", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_loop"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def words(kill_loop, tmp_path) -> list[str]:
    """Two epochs, dropout, accumulation, two data-loader workers."""
    return [
        str(kill_loop.tiny_config(tmp_path)),
        f"--data.cache-dir={tmp_path / 'cache'}",
        "--train.steps=48",
        "--train.global-batch-size=16",
        "--train.micro-batch-size=4",
        "--evaluate.every=20",
    ]


def wait_for_step(run, step: int) -> None:
    """Returns when a step has been logged, half an interval before the next line."""
    while f"step {step}/" not in run.output() and f"step  {step}/" not in run.output():
        assert not run.ended(), run.output()
        time.sleep(0.01)


@pytest.mark.slow
def test_one_process_with_workers(kill_loop, words, tmp_path):
    """SIGTERM for a whole group, as a terminal or a cluster sends it, then SIGKILL."""
    kill_loop.Run(words, tmp_path / "alone", 1).finish()
    run = kill_loop.Run(words, tmp_path / "killed", 1)
    wait_for_step(run, 9)
    for process in (psutil.Process(run.ranks[0].pid), *workers(run.ranks[0].pid)):
        process.send_signal(signal.SIGTERM)
    assert run.ranks[0].wait(60) == 143
    assert "everything saved" in run.output()
    assert "Traceback" not in run.output()
    run = kill_loop.Run(words, tmp_path / "killed", 1)
    wait_for_step(run, 33)
    run.kill([0])
    kill_loop.Run(words, tmp_path / "killed", 1).finish()
    assert kill_loop.outcome(tmp_path / "killed") == kill_loop.outcome(tmp_path / "alone")


def workers(process: int) -> list[psutil.Process]:
    """The data-loader workers of a process, two at least."""
    found = psutil.Process(process).children()
    assert len(found) >= 2
    return found


@pytest.mark.slow
def test_two_processes_stop_together_and_outlive_a_death(kill_loop, words, tmp_path):
    kill_loop.Run(words, tmp_path / "alone", 2).finish()
    run = kill_loop.Run(words, tmp_path / "killed", 2)
    wait_for_step(run, 9)
    run.ranks[1].send_signal(signal.SIGTERM)
    assert [rank.wait(60) for rank in run.ranks] == [143, 143]
    assert run.output().count("everything saved") == 1
    run = kill_loop.Run(words, tmp_path / "killed", 2)
    wait_for_step(run, 33)
    start = time.monotonic()
    run.kill([0])  # the one that speaks for all
    assert time.monotonic() - start < AT_MOST_SECONDS
    assert run.ranks[1].returncode == 1
    assert "process 1 of 2 stops: another process ended unexpectedly" in run.output()
    assert "Traceback" not in run.output()
    kill_loop.Run(words, tmp_path / "killed", 2).finish()
    assert kill_loop.outcome(tmp_path / "killed") == kill_loop.outcome(tmp_path / "alone")


@pytest.mark.slow
def test_processes_that_do_not_divide_the_batch(kill_loop, words, tmp_path):
    run = kill_loop.Run([*words, "--train.micro-batch-size=16"], tmp_path / "run", 2)
    assert [rank.wait(60) for rank in run.ranks] == [2, 2]
    sentences = [line for line in run.output().splitlines() if "textdiff: error" in line]
    assert len(sentences) == 1
    assert "train.global_batch_size 16 cannot be split over 2 processes" in sentences[0]
    assert "a multiple of 2 x 16 = 32" in sentences[0]


# --- how they end ----------------------------------------------------------------------------

LINGERING = """
import sys
from textdiff.cli import main
sys.setswitchinterval(5)  # gloo's threads wait that long for the interpreter's lock
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_end_whatever_their_threads_still_hold(kill_loop, tmp_path):
    """Destroying the groups here, or the interpreter, hangs or aborts in every other run."""
    config = kill_loop.tiny_config(tmp_path)
    flags = ["--train.steps=2", "--data.num-workers=0", f"--data.cache-dir={tmp_path / 'cache'}"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    with ExitStack() as stack:
        words = [sys.executable, "-c", LINGERING, "train", config, f"--run.dir={tmp_path / 'run'}"]
        pair = []
        for rank in "01":
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **address}
            env = {**os.environ, **place}
            pair.append(stack.enter_context(child([*words, *flags], env=env, stderr=STDOUT)))
        said = [process.communicate()[0] for process in pair]
        assert [process.wait() for process in pair] == [0, 0], said


def test_one_of_several_processes_ends_without_taking_the_interpreter_down():
    program = (
        "import atexit, torch.distributed as dist\n"
        "from textdiff.cli import main\n"
        "dist.init_process_group('gloo', rank=0, world_size=1, store=dist.HashStore())\n"
        "atexit.register(print, 'the interpreter goes')\n"
        "main(['trian'])\n"
    )
    done = finished([sys.executable, "-c", program])
    assert done.returncode == 2
    assert "unknown command" in done.stderr
    assert done.stdout == ""


def lose_training_process(heard) -> None:
    """Is a data-loader worker whose training process dies, and breaks by itself afterwards."""
    kinds = []
    sys.excepthook = lambda kind, error, trace: kinds.append(kind)
    _start_worker(0)
    address, _ = resource_sharer.DupFd(0)._id
    caller = socket.socket(socket.AF_UNIX)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.connect(address)
    caller.recv(4)
    caller.close()
    resource_sharer.stop(10)
    try:
        raise ValueError("a row of no length")
    except ValueError:
        sys.excepthook(*sys.exc_info())
    heard.put(kinds)


def test_a_worker_whose_training_process_dies_in_the_middle_of_a_batch_is_silent():
    """And still reports what is its own."""
    heard = FORKS.Queue()
    with forks(partial(lose_training_process, heard), seconds=60):
        assert heard.get(timeout=60) == [ValueError]


# --- what processes do together ------------------------------------------------------------------


def member(rank: int, port: int, end: str, results) -> None:
    """One of two processes; the second one ends in some way halfway through."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    PartialState._reset_state()  # of runs in the process that this one was forked from
    processes.TIMEOUT = timedelta(seconds=4)
    state = PartialState(cpu=True, timeout=processes.TIMEOUT)

    def refuse() -> None:
        raise DataError("no such corpus")

    vote = processes.Vote()
    said = [processes.on_main(state, lambda: f"from {rank}"), vote.largest(7 + rank)]
    try:
        processes.on_main(state, refuse)
    except DataError as error:
        said.append(str(error))
    results.put((rank, said))
    if rank == 1:
        results.close()
        results.join_thread()  # what was put is on its way before the process ends
        os.kill(os.getpid(), getattr(signal, end))
    try:
        with processes.report_lost_process(state):
            vote.largest(1)
    except LostProcessError as error:
        results.put((rank, str(error)))


@pytest.mark.parametrize(
    ("end", "what"), [("SIGKILL", "ended unexpectedly"), ("SIGSTOP", "did not answer in time")]
)
def test_agreement_and_loss(end, what):
    results = FORKS.Queue()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with forks(*(partial(member, rank, port, end, results) for rank in (0, 1)), seconds=240):
        heard = dict(results.get(timeout=60) for _ in (0, 1))
        assert heard[0] == heard[1] == ["from 0", 8, "no such corpus"]
        rank, sentence = results.get(timeout=AT_MOST_SECONDS)
        assert rank == 0
        assert f"process 0 of 2 stops: another process {what}" in sentence
