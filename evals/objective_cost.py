"""Time of a training step by objective, against masked diffusion on the same network.

    python evals/objective_cost.py [--sizes tiny small] [--repeats 5]

Vocabulary 8192, fp32, one thread, process-CPU time. The objectives take turns within one process,
so that whatever else the machine does disturbs all of them alike, and every step is set against the
masked one of its turn. The network is the one that noise other than masks needs (adaptive layer
norm that sees the noise level), for masked diffusion too; a second masked row has it plain.

Memory is the most that is alive at once in tensors whose last axis is the vocabulary (chunks of
logits, what is computed of them, their gradients), in tensors of [B, L, V] float32.
"""

import argparse
import json
import statistics
import sys
import time
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed import MASKED, SIZES, build_step, cpu_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


def size_of(name: str):
    return replace(SIZES[name], vocabulary=8192)


def measure(name: str, repeats: int, seed: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """CPU-seconds of each objective's steps, interleaved, and [B, L, V] tensors of its first one.

    That first step is not part of the times.
    """
    size = size_of(name)
    steps = {
        row: build_step(size, "fp32", seed, diffusion, **network)
        for row, (diffusion, network) in ROWS.items()
    }
    seconds: dict[str, list[float]] = {row: [] for row in steps}
    tensors = {}
    for row, step in steps.items():
        with LogitMemory(size.vocabulary + 1) as memory:
            step(0)
        tensors[row] = memory.most / (4 * size.tokens * (size.vocabulary + 1))
    for number in range(1, repeats + 1):
        for row, step in steps.items():
            start = time.process_time()
            step(number)
            seconds[row].append(time.process_time() - start)
    return seconds, tensors


class LogitMemory(TorchDispatchMode):
    """Bytes of the tensors alive at once whose last axis is the vocabulary.

    Attributes:
        most: the peak.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.most = 0
        self._alive: dict[int, int] = {}  # bytes by address of the storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if tensor(x)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if tensor(x) and x.ndim > 1 and x.shape[-1] == self.vocabulary:
                self._count(x.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address = storage.data_ptr()
        if address in self._alive or address in given:  # a view, or changed in place
            return
        self._alive[address] = storage.nbytes()
        weakref.finalize(storage, self._alive.pop, address, None)
        self.most = max(self.most, sum(self._alive.values()))


def tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/objective_cost.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.sizes:
        found, tensors = measure(name, arguments.repeats, arguments.seed)
        for row, seconds in found.items():
            ratios = [mine / masked for mine, masked in zip(seconds, found["mdlm"], strict=True)]
            record = {
                "size": name,
                "objective": row,
                "step_cpu_seconds": statistics.median(seconds),
                "times_mdlm": statistics.median(ratios),
                "live_logit_tensors": tensors[row],
                "step_cpu_seconds_all": seconds,
            }
            rows.append(record)
            print(
                f"{name:6}{row:22}{record['step_cpu_seconds']:8.2f} s"
                f"{record['times_mdlm']:8.2f} x mdlm{record['live_logit_tensors']:8.2f} [B, L, V]",
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
