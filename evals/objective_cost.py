"""What a training step costs by objective, against masked diffusion on the same network.

    python evals/objective_cost.py [--sizes tiny small] [--repeats 5]

Vocabulary 8192, fp32, one thread, process-CPU time. The objectives take turns within one process,
so that whatever else the machine does disturbs all of them alike. The network is the one that noise
other than masks needs (adaptive layer norm that sees the noise level), for masked diffusion too; a
second masked row has it plain. Memory is the peak of a fresh process above what it held before its
first step (so activations, gradients and optimizer state count too), in tensors of [B, L, V]
float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed import MASKED, SIZES, build_step, cpu_model

SEES_NOISE = {"adaln": True, "time_conditioning": True}
UNIFORM = {**MASKED, "process": "uniform"}
ROWS: dict[str, tuple[dict, dict[str, bool]]] = {
    "mdlm": (MASKED, SEES_NOISE),
    "mdlm, plain network": (MASKED, {}),
    "sedd, absorbing": ({**MASKED, "objective": {"kind": "sedd"}}, SEES_NOISE),
    "udlm": ({**UNIFORM, "objective": {"kind": "udlm"}}, SEES_NOISE),
    "sedd, uniform": ({**UNIFORM, "objective": {"kind": "sedd"}}, SEES_NOISE),
    "gidd": (
        {
            **MASKED,
            "process": "hybrid",
            "schedule": {"kind": "hybrid", "uniform": 0.1},
            "objective": {"kind": "gidd"},
        },
        SEES_NOISE,
    ),
}
WARMUP_STEPS = 2


def size_of(name: str):
    return replace(SIZES[name], vocabulary=8192)


def times(name: str, repeats: int, seed: int) -> dict[str, list[float]]:
    """CPU-seconds of each objective's steps, interleaved."""
    torch.set_num_threads(1)
    steps = {
        row: build_step(size_of(name), "fp32", seed, diffusion, **network)
        for row, (diffusion, network) in ROWS.items()
    }
    found: dict[str, list[float]] = {row: [] for row in steps}
    for number in range(WARMUP_STEPS + repeats):
        for row, step in steps.items():
            start = time.process_time()
            step(number)
            if number >= WARMUP_STEPS:
                found[row].append(time.process_time() - start)
    return found


def peak(name: str, row: str, seed: int) -> float:
    """Peak memory of a step in [B, L, V] float32 tensors, in this process."""
    torch.set_num_threads(1)
    size = size_of(name)
    diffusion, network = ROWS[row]
    step = build_step(size, "fp32", seed, diffusion, **network)
    before = resident("VmRSS")
    for number in range(WARMUP_STEPS):
        step(number)
    return (resident("VmHWM") - before) / (4 * size.tokens * (size.vocabulary + 1))


def resident(field: str) -> int:
    """Bytes that Linux counts for this process; its ru_maxrss would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_in_fresh_process(name: str, row: str, seed: int) -> float:
    command = [sys.executable, __file__, "--peak", json.dumps([name, row, seed])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/objective_cost.json"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        print(peak(*json.loads(arguments.peak)))
        return
    rows = []
    for name in arguments.sizes:
        found = times(name, arguments.repeats, arguments.seed)
        reference = statistics.median(found["mdlm"])
        for row, seconds in found.items():
            record = {
                "size": name,
                "objective": row,
                "step_cpu_seconds": statistics.median(seconds),
                "times_mdlm": statistics.median(seconds) / reference,
                "peak_logit_tensors": peak_in_fresh_process(name, row, arguments.seed),
                "step_cpu_seconds_all": seconds,
            }
            rows.append(record)
            print(
                f"{name:6}{row:22}{record['step_cpu_seconds']:8.2f} s"
                f"{record['times_mdlm']:8.2f} x mdlm{record['peak_logit_tensors']:8.2f} [B, L, V]",
                flush=True,
            )
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": arguments.seed,
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "vocabulary": 8192,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
