"""Ctrl-C before a verb begins, within imports and after its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from children import finished

# Python imports it before anything else. Code from a string is what methods of dataclasses are made
# by: an interrupt that leaves it has an effect of its own on the exit code.
SITE = """
import atexit, os, signal, sys

def interrupt():
    exec("os.kill(os.getpid(), signal.SIGINT)")

class Interrupting:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            interrupt()
        if name == "textdiff.cli" and {after!r} == "the verb":
            atexit.register(interrupt)

sys.meta_path.insert(0, Interrupting)
if {after!r} == "everything":
    atexit.register(interrupt)
"""


def interrupted(
    folder: Path, *words: str, module: str = "", after: str = ""
) -> subprocess.CompletedProcess:
    """The program, interrupted where it imports a module or after something."""
    (folder / "sitecustomize.py").write_text(SITE.format(module=module, after=after))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = (sys.executable, "-m", "textdiff", *words)
    return finished(words, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.parametrize(
    ("module", "said"), [("textdiff.commands.chat", ""), ("torch", "textdiff: interrupted\n")]
)
def test_ctrl_c_during_imports(tmp_path, module, said):
    done = interrupted(tmp_path, "doctor", module=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", said)


@pytest.mark.parametrize("after", ["the verb", "everything"])
def test_ctrl_c_after_the_end_changes_no_result(tmp_path, after):
    done = interrupted(tmp_path, "--version", after=after)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("textdiff ")
