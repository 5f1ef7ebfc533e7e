"""How idle threads wait: in the environment before torch is loaded, unless the user has said it."""

import json
import os
import sys

import pytest
from children import finished

from textdiff.cli import main
from textdiff.commands.doctor import probe_machine
from textdiff.commands.parallel import SPINS, VARIABLES, idle_threads, spin_briefly

PLAIN = {key: value for key, value in os.environ.items() if key not in VARIABLES}


def test_threads_spin_briefly_in_a_verb():
    """What OpenMP says that it has read."""
    program = "from textdiff.cli import main; main(['--version']); import torch"
    done = finished([sys.executable, "-c", program], env={**PLAIN, "OMP_DISPLAY_ENV": "VERBOSE"})
    assert done.returncode == 0
    if "OPENMP DISPLAY ENVIRONMENT" in done.stderr:  # another OpenMP may say nothing
        assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_has_set_stays(name):
    program = "from textdiff.cli import main; import json, os; main(['--version']); "
    program += "print(json.dumps(dict(os.environ)))"
    done = finished([sys.executable, "-c", program], env={**PLAIN, name: "7"})
    environment = json.loads(done.stdout.splitlines()[-1])
    assert {key: environment.get(key) for key in VARIABLES} == {
        key: "7" if key == name else None for key in VARIABLES
    }


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "spin for a while"),
        ({"GOMP_SPINCOUNT": SPINS}, "spin briefly, then sleep"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "as set by OMP_WAIT_POLICY=PASSIVE"),
        ({"GOMP_SPINCOUNT": "9"}, "as set by GOMP_SPINCOUNT=9"),
    ],
)
def test_doctor_reports_it(monkeypatch, capsys, given, words):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("textdiff.commands.doctor.PROBES", ((probe_machine, False),))
    spin_briefly()  # torch is loaded here: it changes nothing
    assert idle_threads().startswith(words)
    capsys.readouterr()
    assert main(["doctor", "--json"]) == 0
    (finding,) = (
        found
        for found in json.loads(capsys.readouterr().out)["findings"]
        if found["name"] == "idle threads"
    )
    assert finding["value"].startswith(words)
