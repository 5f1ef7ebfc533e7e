"""Cost and gain of idle threads that sleep instead of spin.

    python evals/neighbour.py [--pairs 8] [--threads 1 2] [--spins 1000] [--output neighbour.json]

OpenMP's threads meet at the end of every operation. By default those that are there first spin for
a while. Where another process has a core, a thread that spins can keep it from the one that all
wait for. `OMP_WAIT_POLICY=PASSIVE` lets them sleep at once, `GOMP_SPINCOUNT` after so many turns;
waking them costs time on an idle machine.

For every setting of the environment and number of threads one process holds a network and waits.
They work in turn, a second at a time, with an idle machine and with one busy process beside them;
a round in which each has worked once gives pairs. `ratio` is the median over the rounds of a
setting's rate by that of the default in the same round. Rates are training tokens and network calls
of generation per second of wall-clock time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

POLICIES = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
WORK = ("train", "generate")
SECONDS = 1.0
SHAPE = (128, 4, 4, 128, 8, 2048)  # hidden, layers, heads, length, rows, vocabulary


class Worker:
    """A process with a network that works when it is asked to."""

    def __init__(self, policy: str, threads: int):
        plain = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env={**plain, **POLICIES[policy], "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def rate(self, work: str) -> float:
        """Tokens or calls per second of about a second of work."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{work}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def work() -> None:
    """Works as standard input says."""
    from decoding_cost import Case, build
    from speed import SIZES, Size, build_step

    SIZES["neighbour"] = Size(*SHAPE)
    step = build_step(SIZES["neighbour"], "fp32", seed=0)
    case = Case("neighbour", "mdlm", "ancestral", 64, (1.0, ""), 1.0)
    model, family = build(case)
    number = 0

    def train() -> Iterator[float]:
        nonlocal number
        while True:
            step(number)
            number += 1
            yield float(SIZES["neighbour"].tokens)

    def write() -> Iterator[float]:
        from textdiff.sampling.engine import Engine
        from textdiff.sampling.job import Job
        from textdiff.sampling.request import Request
        from textdiff.sampling.settings import SamplingConfig

        seed = 0
        while True:
            seed += 1
            job = Job([[]] * 4, [case.tokens] * 4, seed=seed)
            config = SamplingConfig(rule=case.rule, steps=64, cache="off")
            for _ in Engine(model, family, Request(job, config)).run():
                yield 1.0

    todo = {"train": train(), "generate": write()}
    for steps in todo.values():
        for _ in range(3):
            next(steps)
    for line in sys.stdin:
        done, start = 0.0, time.perf_counter()
        while (spent := time.perf_counter() - start) < SECONDS:
            done += next(todo[line.strip()])
        print(done / spent, flush=True)


@contextmanager
def neighbour(busy: bool) -> Iterator[None]:
    """A process that takes all the time that it gets, if it is to be there."""
    if not busy:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)
        yield
    finally:
        process.kill()
        process.wait()


def measure(threads: int, pairs: int, say: Callable[[dict], None]) -> list[dict]:
    """All cells of a number of threads."""
    workers = {policy: Worker(policy, threads) for policy in POLICIES}
    for worker in workers.values():
        worker.rate("train")
    cells = []
    for kind in WORK:
        for busy in (False, True):
            rounds: list[dict[str, float]] = []
            with neighbour(busy):
                for number in range(pairs):
                    order = (
                        list(POLICIES)[number % len(POLICIES) :]
                        + list(POLICIES)[: number % len(POLICIES)]
                    )
                    rates = {policy: round(workers[policy].rate(kind), 2) for policy in order}
                    rounds.append({policy: rates[policy] for policy in POLICIES})
            cells.append(summary(kind, threads, busy, rounds))
            say(cells[-1])
    for worker in workers.values():
        worker.close()
    return cells


def summary(kind: str, threads: int, busy: bool, rounds: list[dict[str, float]]) -> dict:
    medians = {p: round(statistics.median(r[p] for r in rounds), 1) for p in POLICIES}
    ratios = {
        policy: round(statistics.median(r[policy] / r["default"] for r in rounds), 3)
        for policy in POLICIES
    }
    cell = {"work": kind, "threads": threads, "busy_neighbour": busy}
    return cell | {"median": medians, "ratio": ratios, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--spins", nargs="+", default=["1000"])
    parser.add_argument("--output", type=Path, default=Path("neighbour.json"))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    POLICIES.update({f"{count} spins": {"GOMP_SPINCOUNT": count} for count in arguments.spins})
    import torch
    from speed import cpu_model

    cells: list[dict] = []
    record = {
        "command": " ".join(["python", "evals/neighbour.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "policies": POLICIES,
        "unit": {"train": "tokens per second", "generate": "network calls per second"},
        "cells": cells,
    }
    for threads in arguments.threads:
        cells += measure(
            threads, arguments.pairs, lambda cell: print({**cell, "rounds": None}, flush=True)
        )
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
