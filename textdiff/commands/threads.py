"""How idle threads wait, decided before torch is loaded."""

import os
import sys

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What OpenMP reads once, when it is loaded."""

SPINS = "1000"
"""Turns before a thread sleeps; `evals/results/neighbour.json` says why."""


def spin_briefly() -> None:
    """Lets idle threads sleep soon, unless the environment says how they wait.

    Threads meet at the end of every operation. Where another process has one of the cores, those
    that spin keep it from the one that they all wait for. Threads that sleep at once have to be
    woken for every operation, which costs time where nobody is in the way. GNU's OpenMP, which
    torch has on Linux, spins less by itself where it has more threads than cores, but does not know
    of other processes. Other OpenMPs do not read the variable.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def described() -> str:
    """How idle threads wait, with the variables that say so."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    words = ", ".join(f"{name}={value}" for name, value in found.items())
    if found == {"GOMP_SPINCOUNT": SPINS}:
        return f"spin briefly, then sleep ({words})"
    return f"as set by {words}" if found else "spin for a while (OpenMP's default)"
