"""Check the parts of a run that need a GPU, each against a reference with a tolerance.

    python tests/manual/gpu_numbers.py                 # on a machine with a GPU
    python tests/manual/gpu_numbers.py --device cpu    # the part that a CPU can do

| check | reference | tolerance |
|---|---|---|
| every backend and layout, float32, forward and backward | eager, float32 | 1e-4 |
| the same under bfloat16 autocast | eager, float32 | 3e-2 forward, 6e-2 backward |
| compiled blocks, float32 | the same blocks, not compiled | 1e-4 |
| two steps of mdlm-owt-small, bound of the validation text | log of the vocabulary | below 1.3 x |
| bound of a text on the device, float32 | on the CPU, float64 | 1e-4 |
| text generated on the device, float64 | on the CPU, float64 | the same tokens |

Differences are norms: |found - reference| / |reference|, over logits outside padding, or over all
gradients. TF32 is off. A backend that is not installed, or does not offer a layout, is skipped with
the reason. On a GPU the result goes to `evals/results/gpu_numbers.json` too. Exit code 0: all that
ran passed; 1: something did not, or torch sees no GPU.

It has not been run on a GPU yet: tolerances are what rounding allows, not what was measured there.
"""

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from textdiff import TextDiffusion
from textdiff.cli import main as textdiff
from textdiff.commands.flags import parse_verb

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))  # its checks of attention are a stage there
from gpu_checks.checks import Check, difference, first_line  # noqa: E402
from gpu_checks.layouts import BACKWARD, FORWARD, PARTS, Network, attention_checks  # noqa: E402
from gpu_checks.result import record  # noqa: E402

RESULT = ROOT / "evals" / "results" / "gpu_numbers.json"
# Two steps of the published model on text that every Python has.
STEPS = {
    "data.sources": '[{"source": "python-docs"}]',
    "tokenizer": '{"kind": "bpe", "vocab_size": 8192}',
    "train.steps": "2",
    "train.global-batch-size": "16",
    "train.micro-batch-size": "8",
    "train.log-every": "1",
    "evaluate.max-documents": "4",
    "data.num-workers": "0",
    "sample.num-samples": "0",
    "sample.steps": "16",
    "sample.max-new-tokens": "32",
}
# A CPU has neither the time nor, everywhere, bfloat16.
ON_CPU = {
    "model.hidden-size": "32",
    "model.num-layers": "2",
    "model.num-heads": "2",
    "data.sequence-length": "64",
    "tokenizer": '{"kind": "byte"}',
    "train.compile": "false",
    "train.mixed-precision": "fp32",
}


def compile_checks(device: torch.device) -> Iterator[Check]:
    """Compiled blocks against themselves, on the layouts that training compiles."""
    if device.type == "cpu":
        yield Check("compiled blocks", None, 0.0, "left to the test suite on a CPU", True)
        return
    for backend, name in itertools.product(("sdpa", "flex_attention"), ("full", "block_diffusion")):
        plain, compiled = Network(device), Network(device)
        for block in compiled.model.blocks:
            block.compile()
        layout = plain.layouts()[name]
        try:
            found = [n.run(backend, layout, "float32", gradients=True) for n in (compiled, plain)]
        except Exception as error:
            yield Check(f"compiled {backend}, {name}", None, 0.0, first_line(error))
            continue
        limits = [FORWARD["float32"], BACKWARD["float32"]]
        for part, one, other, limit in zip(PARTS, *found, limits, strict=True):
            yield Check(f"compiled {backend}, {name}, {part}", difference(one, other), limit)


def model_checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """Two steps of the published small model, then its bound and its text on both devices."""
    flags = {**STEPS, **(ON_CPU if device.type == "cpu" else {})}
    words = [f"--{key}={value}" for key, value in flags.items()]
    words += [f"--run.dir={folder / 'run'}", f"--data.cache-dir={folder / 'cache'}"]
    code = textdiff(["train", str(ROOT / "configs" / "mdlm-owt-small.yaml"), *words])
    if code != 0:
        yield Check("two steps of mdlm-owt-small", None, 0.0, f"exit code {code}, see above")
        return
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    bounds = [row["bound_nats"] for row in map(json.loads, lines) if "bound_nats" in row]
    here, there = (
        TextDiffusion.from_pretrained(folder / "run", device=where, dtype=dtype)
        for where, dtype in ((device.type, "float32"), ("cpu", "float64"))
    )
    uniform = math.log(here.model.config.vocab_size)
    yield Check("bound after two steps / log of the vocabulary", bounds[-1] / uniform, 1.3)
    text = ["Return a new list containing all items of the iterable in ascending order."]
    values = [model.score(text)[0].mean for model in (here, there)]
    yield Check("bound of a text, device : CPU", abs(values[0] / values[1] - 1.0), 1e-4)
    exact = TextDiffusion.from_pretrained(folder / "run", device=device.type, dtype="float64")
    texts = [model.generate("", num_samples=4, seed=0).texts for model in (exact, there)]
    changed = sum(one != other for one, other in zip(*texts, strict=True))
    yield Check("texts that differ, device : CPU, float64", float(changed), 0.0)


def show(checks: list[Check], device: torch.device) -> None:
    """Prints the table."""
    table = Table("check", "difference", "limit", "", title=f"{device} · torch {torch.__version__}")
    for check in checks:
        verdict = "skipped" if check.skipped else "ok" if check.passed else "FAILED"
        found = "" if check.found is None else f"{check.found:.2e}"
        limit = "" if check.skipped else f"{check.limit:g}"
        table.add_row(check.name, found, limit, ": ".join(filter(None, (verdict, check.note))))
    Console().print(table)


def gpu_numbers(device: str = "cuda", output: Path | None = None) -> int:
    """Checks a GPU (or the CPU part of the same checks).

    Args:
        device: cuda, or cpu.
        output: JSON file for the result; on a GPU the default is evals/results/gpu_numbers.json.
    """
    if device != "cpu" and not torch.cuda.is_available():
        message = "torch sees no GPU here; --device cpu runs a part"
        print(f"gpu_numbers: {message}", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("highest")
    where = torch.device(device)
    parts: list[Callable[[], Iterator[Check]]] = [
        lambda: attention_checks(where),
        lambda: compile_checks(where),
    ]
    checks = [check for part in parts for check in part()]
    with tempfile.TemporaryDirectory() as folder:
        checks += model_checks(where, Path(folder))
    show(checks, where)
    output = output or (RESULT if where.type == "cuda" else None)
    if output is not None:
        output.write_text(json.dumps(record(checks, where), indent=1) + "\n")
    failed = [check.name for check in checks if not check.passed]
    print(f"{len(checks)} checks, {len(failed)} failed" + "".join(f"\n  {n}" for n in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(parse_verb(gpu_numbers, "gpu_numbers.py", sys.argv[1:])())
