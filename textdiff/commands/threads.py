"""How idle threads wait, decided before torch is loaded."""

import os

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""What OpenMP reads once, when it is loaded."""


def wait_asleep() -> None:
    """Lets idle OpenMP threads sleep instead of spin, unless the environment says how they wait.

    Threads meet at the end of every operation. Where another process has one of the cores, those
    that spin keep it from the one that they all wait for.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def described() -> str:
    """The settings in force, as the environment would have them."""
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join(found) or "not set"
