"""The children of tests: their sessions, their end, and that there are no others."""

import ast
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from children import FORKS, child, finished, forks
from source_trees import nodes

TESTS = Path(__file__).resolve().parent
STARTERS = {"run", "call", "check_call", "check_output", "Popen", "fork", "forkpty", "system"}


def test_what_a_child_says_and_how_it_ends():
    done = finished([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")


def test_a_child_is_alone_in_its_session():
    done = finished([sys.executable, "-c", "import os; print(os.getpid(), os.getsid(0))"])
    pid, session = done.stdout.split()
    assert pid == session != str(os.getsid(0))


def test_a_child_that_signals_its_group_hits_nobody_else():
    done = finished([sys.executable, "-c", "import os, signal; os.killpg(0, signal.SIGTERM)"])
    assert done.returncode == -signal.SIGTERM


def test_a_hang_is_ended_and_told():
    program = "import time\ndef stuck():\n    time.sleep(100)\nprint('here', flush=True)\nstuck()"
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)within 2 s.*here.*in stuck"):
        finished([sys.executable, "-c", program], seconds=2)
    assert time.monotonic() - start < 30


def test_what_a_child_leaves_behind_is_found():
    """A grandchild in another session, whose parent is gone."""
    orphan = "import time; time.sleep(100)"
    program = f"""
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", {orphan!r}], start_new_session=True).pid)
"""
    with child([sys.executable, "-c", program]) as process:
        left = psutil.Process(int(process.stdout.readline()))
        assert process.wait() == 0
        assert left.is_running()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


def test_a_fork_has_a_session_and_an_end():
    heard = FORKS.Queue()
    with forks(lambda: heard.put((os.getpid(), os.getsid(0))), lambda: time.sleep(100)):
        number, session = heard.get(timeout=60)
        assert number == session != os.getsid(0)
    assert not psutil.Process().children()
    with pytest.raises(AssertionError, match=r"did not end within 0\.1 s"):
        wait_for_a_fork_that_hangs()


def wait_for_a_fork_that_hangs() -> None:
    with forks(lambda: time.sleep(100), seconds=0.1):
        (process,) = psutil.Process().children()
        process.wait(60)


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_time_limit_from_outside_is_told(tmp_path, processes):
    """What SIGTERM makes of pytest: the place, and no traceback of an innocent test."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import os, pathlib, time\n\ndef test_that_takes_long():\n"
        "    pathlib.Path('begun').write_text(str(os.getpid()))\n    time.sleep(100)\n"
    )
    words = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    begun = tmp_path / "begun"
    with child([*words, "-n", processes, "--rootdir", tmp_path], cwd=tmp_path) as process:
        while not (begun.exists() and begun.read_text()):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, stacks = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM in test_it.py::test_that_takes_long (call)" in stacks
    assert "FAILED" not in said
    assert "test_it.py" in stacks
    assert not psutil.pid_exists(int(begun.read_text()))


def test_no_other_way_to_start_a_process():
    """All of them have a session, a limit and an end; `multiprocessing` only by `spawn`."""
    others = set(TESTS.rglob("*.py")) - {*TESTS.glob("manual/*.py"), TESTS / "children.py"}
    calls = [
        (f"{path.name}:{node.lineno}", node.func.value.id, node)
        for path in sorted(others)
        for node in nodes(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if isinstance(node.func.value, ast.Name)
    ]
    assert len(calls) > 1000
    for place, owner, call in calls:
        if owner in ("subprocess", "os"):
            assert call.func.attr not in STARTERS, place
        if owner == "multiprocessing":
            assert [argument.value for argument in call.args] == ["spawn"], place
