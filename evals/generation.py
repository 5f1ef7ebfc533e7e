"""Tokens per CPU-second of the block sampler, against what the same CPU does in matrix products.

    python evals/generation.py [--sizes tiny small] [--rows 4 1] [--precisions fp32] [--repeats 3]

Networks have random weights; blocks are of 16 tokens, revealed one per call (`first_hitting`); the
text is as long as the training sequence. Every network call counts, those that store finished
blocks too. One thread, process-CPU time; the peak is the best median of square products timed in
between. Compare tokens per second over the peak: absolute figures belong to one machine.

`--growth` generates one long text instead and writes how the cost of a call grows with what is in
the cache, as a table and as a plot.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from speed import GEMM_SIZES, SIZES, Size, cpu_model

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig

BLOCK = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}


def build(
    size: Size, precision: str, block: int | None = BLOCK
) -> tuple[TextDiffusionModel, Family]:
    """A network with random weights, and its family."""
    torch.manual_seed(0)
    mask = size.vocabulary
    config = TextDiffusionConfig(
        vocab_size=mask + 1,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        mask_token_id=mask,
        attn_implementation="sdpa",
    )
    model = TextDiffusionModel(config).eval().to(DTYPES[precision])
    if precision == "int8":
        from torch.ao.quantization import quantize_dynamic

        model = quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "mdlm"},
        "block_size": block,
    }
    return model, build_family(spec, Vocabulary.of(mask + 1, mask))


def walk(
    model: TextDiffusionModel, family: Family, rows: int, length: int, cache: bool, seed: int
) -> tuple[int, list[float]]:
    """Generates, and returns network calls and the CPU-seconds at every one."""
    job = Job([[]] * rows, [length] * rows, seed=seed)
    times, calls = [time.process_time()], 0
    config = SamplingConfig(rule="first_hitting", steps=1, cache=cache, window=0)
    for step in Engine(model, family, Request(job, config)).run():
        calls = step.calls
        times.append(time.process_time())
    return calls, times


def timed(call: Callable[[], object]) -> float:
    """CPU-seconds of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(name: str, rows: int, precision: str, cache: bool, repeats: int) -> dict[str, object]:
    """Medians over generations, with matrix products in between."""
    size = SIZES[name]
    model, family = build(size, precision)
    dtype = DTYPES[precision]
    operands = [torch.randn(n, n).to(dtype) for n in GEMM_SIZES]
    walk(model, family, rows, 2 * BLOCK, cache, 0)
    seconds, calls = [], 0
    gemm: dict[int, list[float]] = {n: [] for n in GEMM_SIZES}
    for repeat in range(repeats):
        calls, times = walk(model, family, rows, size.length, cache, repeat)
        seconds.append(times[-1] - times[0])
        for operand in operands:
            gemm[len(operand)].append(timed(lambda a=operand: a @ a))
    peak = max(2 * n**3 / statistics.median(spent) for n, spent in gemm.items()) / 1e9
    tokens = rows * size.length
    rate = tokens / statistics.median(seconds)
    return {
        "size": name,
        "rows": rows,
        "precision": precision,
        "cache": cache,
        "tokens": tokens,
        "calls": calls,
        "tokens_per_cpu_second": round(rate, 1),
        "gemm_peak_gflops": round(peak, 1),
        "tokens_per_gflop": round(rate / peak, 4),
    }


def growth(name: str, tokens: int, precision: str, folder: Path) -> dict[str, object]:
    """Milliseconds per call by what is in the cache, for one row far beyond its context."""
    import matplotlib.pyplot as plt

    size = SIZES[name]
    model, family = build(size, precision)
    _, times = walk(model, family, 1, tokens, True, 0)
    spent = torch.tensor(times, dtype=torch.float64).diff() * 1e3
    blocks = spent.view(-1, BLOCK)
    groups = blocks.view(-1, max(1, len(blocks) // 16), BLOCK).flatten(1).median(1).values
    step = tokens / len(groups)
    prefix = [round(step * (i + 0.5)) for i in range(len(groups))]
    figure, axes = plt.subplots(figsize=(6, 3.5))
    axes.plot(prefix, groups, "o-")
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("CPU-milliseconds per call")
    axes.set_ylim(bottom=0)
    axes.set_title(f"one row, {name}, blocks of {BLOCK}, {precision}")
    figure.tight_layout()
    figure.savefig(folder / "generation_growth.png", dpi=120)
    return {
        "size": name,
        "precision": precision,
        "prefix": prefix,
        "ms_per_call": [round(float(x), 3) for x in groups],
    }


def main() -> None:
    """Measures, prints and writes `results/generation.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 1])
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-cache", action="store_true", help="measure without a cache")
    parser.add_argument("--growth", type=int, default=0, help="tokens of one long text instead")
    folder = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=folder / "generation.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    if arguments.growth:
        known["growth"] = growth(arguments.sizes[0], arguments.growth, "fp32", arguments.out.parent)
        print(json.dumps(known["growth"]))
    else:
        for name in arguments.sizes:
            for rows in arguments.rows:
                for precision in arguments.precisions:
                    row = measure(name, rows, precision, not arguments.no_cache, arguments.repeats)
                    print(json.dumps(row), flush=True)
                    key = ("size", "rows", "precision", "cache")
                    known["rows"] = [
                        old for old in known["rows"] if any(old[k] != row[k] for k in key)
                    ] + [row]
    known["made"] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "OMP_NUM_THREADS=1 python evals/generation.py",
        "torch": torch.__version__,
        "cpu": cpu_model(),
    }
    arguments.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
