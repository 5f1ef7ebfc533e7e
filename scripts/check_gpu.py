"""Check and measure training and generation on a GPU, stage by stage, within a budget of seconds.

    python scripts/check_gpu.py                                  # on a machine with a GPU
    python scripts/check_gpu.py --device cpu --output here.json  # what a CPU can do of it

| stage | reference, or figure |
|---|---|
| `ceilings` | figures: bandwidth of a copy, products in bfloat16 |
| `layouts` | backends and layouts against `eager` |
| `documents` | FlashAttention to documents, by its package and by torch, against `eager` |
| `steps` | loss and gradients of a step of every objective, float32, against the CPU in float64 |
| `waits` | such a step, from a pinned batch, where to wait is an error; texts, by calls |
| `graphs` | compiled blocks: graphs, breaks, and none more after an evaluation |
| `resume` | 3 + 3 steps equal 6, bit for bit: `train.deterministic`, Muon, recomputed blocks |
| `tokens` | texts in float64 against the CPU's |
| `replays` | texts by recorded calls (CUDA graphs) against calls launched kernel by kernel; time |
| `training` | figures: a step and its phases, MFU, memory over that of `textdiff plan` |
| `sampling` | figures: tokens per second of 1, 16 and 64 rows, and of a bound |
| `kernels` | the kernels of a step that take the most time |

`gpu_checks/` beside this file holds the stages, each in the file of its name; but `documents` and
`steps` are in `numerics.py`, and figures and kernels in `speed.py`.

Each line is printed at once, and the result so far is written with it: not passed, until the last
stage has ended. A stage that fails does not end the others. One that would begin after the budget
is left out. Exit code 0: all that ran passed; 1: something did not, or torch sees no GPU; 130:
interrupted, 143: by SIGTERM. Not run on a GPU yet: limits allow for rounding.
"""

import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from gpu_checks.checks import Check, Checks, Stage, contained
from gpu_checks.device import clear, set_up
from gpu_checks.graphs import graphs
from gpu_checks.layouts import layouts
from gpu_checks.numerics import documents, steps
from gpu_checks.replays import replays
from gpu_checks.result import Result
from gpu_checks.resume import resume
from gpu_checks.speed import ceilings, kernels, sampling, training
from gpu_checks.tokens import tokens
from gpu_checks.waits import waits

from textdiff.commands.flags import parse_verb
from textdiff.errors import ConfigError
from textdiff.export.loading import find_device
from textdiff.signals import exit_code, interruptible

RESULT = Path(__file__).resolve().parents[1] / "evals" / "results" / "check_gpu.json"
STAGES: list[Stage] = [
    ceilings, layouts, documents, steps, waits, graphs, resume, tokens, replays, training, sampling,
    kernels,
]  # fmt: skip


def check_gpu(
    device: str = "cuda", only: str = "", budget: float = 350.0, output: Path | None = None
) -> int:
    """Check and measure a device.

    Args:
        device: cuda, cuda:N or cpu.
        only: names of stages, with commas; empty: all.
        budget: seconds after which no stage begins.
        output: JSON file of the result; on a GPU the default is evals/results/check_gpu.json.
    """
    try:
        where, stages = _device(device), _stages(only)
        result = _begun(where, output or (RESULT if where.type == "cuda" else None))
    except ConfigError as error:
        print(f"check_gpu: {error}", file=sys.stderr)
        return 1
    set_up(where)
    code = 0
    try:
        with interruptible():
            run_stages(stages, where, budget, result)
    except KeyboardInterrupt as stop:
        result.take(Check("interrupted", None, 0.0, "the stages after this line did not run"))
        code = exit_code(stop)
    result.write(finished=code == 0)
    failed = [check.name for check in result.checks if not check.passed]
    names = "".join(f"\n  {name}" for name in failed)
    print(f"{len(result.checks)} lines, {len(failed)} failed{names}")
    return code or (1 if failed else 0)


def run_stages(stages: list[Stage], device: torch.device, budget: float, result: Result) -> None:
    """Run stages in turn; none begins after the budget."""
    start = time.monotonic()
    for stage in stages:
        began = time.monotonic()
        for check in run_stage(stage, device, began - start <= budget):
            result.take(check)
        print(f"        {stage.__name__}: {time.monotonic() - began:.1f} s", flush=True)


def run_stage(stage: Stage, device: torch.device, within_budget: bool) -> Checks:
    """Yield a stage's checks; its failure is one of them."""
    if not within_budget:
        yield Check(stage.__name__, None, 0.0, "the budget was used up", True)
        return
    # A disk of the network may keep a file that is still mapped.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield from contained(stage.__name__, _checks_of(stage, device, Path(folder)))


def _checks_of(stage: Stage, device: torch.device, folder: Path) -> Checks:
    """Yield a stage's checks under its name, on a device that is cleared before."""
    clear(device)
    for check in stage(device, folder):
        yield replace(check, name=f"{stage.__name__}: {check.name}")


def _device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ConfigError: it is not here, or nothing is checked on its kind.
    """
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: choose cuda, cuda:N or cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --device cpu runs a part")
    return find_device(name)


def _stages(only: str) -> list[Stage]:
    """Return the stages of those names, in their order.

    Raises:
        ConfigError: an unknown stage.
    """
    wanted, names = {name for name in only.split(",") if name}, [s.__name__ for s in STAGES]
    if unknown := wanted - set(names):
        listed = ", ".join(sorted(unknown))
        raise ConfigError(f"--only: no stage {listed}; choose from {', '.join(names)}")
    return [stage for stage in STAGES if not wanted or stage.__name__ in wanted]


def _begun(device: torch.device, output: Path | None) -> Result:
    """Return a result without lines, written where the others will be.

    Raises:
        ConfigError: nothing can be written there.
    """
    result = Result(device, output)
    try:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
        result.write()
    except OSError as error:
        message = f"cannot write {output}: {error.strerror}; choose another --output"
        raise ConfigError(message) from None
    return result


if __name__ == "__main__":
    try:
        call = parse_verb(check_gpu, "check_gpu.py", sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"check_gpu: {error}")
    sys.exit(call())
