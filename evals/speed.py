"""Speed of the training step on a CPU, as a fraction of what the same CPU does in matrix products.

    python evals/speed.py [--sizes tiny small] [--precisions fp32 bf16] [--repeats 5] [--block 16]

One step is: draw the noise of a batch, corrupt it, forward, backward, clip, fused AdamW (dropout
0.1, no adaLN, MDLM objective). Each row is measured in fresh processes: one thread in process-CPU
time, and two threads in wall-clock time beside it. Between the steps a process times square matrix
products; the peak is the best size's median. Useful work counts what the mathematics needs
(`Size.useful_flops`), so work that is skipped still counts. Compare the fractions of the peak:
absolute figures belong to one machine, and other processes on it disturb both.

With `--block` the step is block diffusion's, and the same process then times full-sequence steps in
turn with it; `ratio` is what a step costs more.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import ByCount, NoiseUniforms, draw_noise
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, stratified, uniforms
from textdiff.loss import DenoisingLoss, corrupt
from textdiff.models import Denoiser, TextDiffusionConfig, TextDiffusionModel

GEMM_SIZES = (2048, 3072, 4096)
WARMUP_STEPS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A network and a batch."""

    hidden: int
    layers: int
    heads: int
    length: int
    rows: int
    vocabulary: int  # without the mask

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def useful_flops(self, block: int | None = None) -> float:
        """Per data token, forward and backward.

        Full sequence: 3 (24 h^2 n + 2 h V' + 4 h L n). In blocks, with P allowed pairs of queries
        and keys in both streams: 3 (48 h^2 n + 2 h V' + 4 h n P / L).
        """
        streams, pairs = 1, self.length**2
        if block is not None:
            number = self.length // block
            streams, pairs = 2, self.length * block + block**2 * number**2
        blocks = streams * 24 * self.hidden**2 * self.layers
        head = 2 * self.hidden * (self.vocabulary + 1)
        attention = 4 * self.hidden * self.layers * pairs / self.length
        return 3.0 * (blocks + head + attention)


SIZES = {
    "tiny": Size(256, 6, 4, 256, 16, 256),
    "small": Size(384, 8, 6, 512, 8, 8192),
}
REPEATS = {"tiny": 5, "small": 3}


MASKED = {
    "process": "absorbing",
    "schedule": {"kind": "loglinear", "eps": 0.0},
    "objective": {"kind": "mdlm"},
    "block_size": None,
}


def build_step(
    size: Size,
    precision: str,
    seed: int,
    diffusion: dict = MASKED,
    loss: Callable[..., torch.nn.Module] = DenoisingLoss,
    denoiser: Denoiser | None = None,
    **network: Any,
) -> Callable[[int], None]:
    """A training step by number, on random tokens.

    `denoiser` replaces our Transformer, of which `network` switches options.
    """
    torch.manual_seed(seed)
    mask = size.vocabulary
    config = TextDiffusionConfig(
        vocab_size=mask + 1,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        mask_token_id=mask,
        attn_implementation="sdpa",
        **{"dropout": 0.1, **network},
    )
    family = build_family(diffusion, Vocabulary.of(mask + 1, mask))
    module = loss(denoiser or TextDiffusionModel(config), family).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    x0 = torch.randint(0, mask, (size.rows, size.length))
    rows, positions, blocks = (
        torch.arange(size.rows),
        torch.arange(size.length),
        family.blocks(size.length),
    )
    entries = torch.arange(size.rows * blocks.count)

    def step(number: int) -> None:
        v = stratified(
            uniforms(seed, Stream.STRATA, step=number, position=entries),
            uniforms(seed, Stream.JITTER, step=number, position=entries),
        )
        samples = number * size.rows + rows
        u = uniforms(seed, Stream.POSITION, row=samples[:, None], position=positions)
        u_token = None
        if family.process.replaces_tokens:
            u_token = uniforms(seed, Stream.TOKEN, row=samples[:, None], position=positions)
        noise = draw_noise(family, x0, NoiseUniforms(v.view(size.rows, -1), u, u_token), ByCount())
        batch = corrupt(family, x0, noise, None)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss, _ = module(batch)
        (loss / size.tokens).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    name: str, precision: str, threads: int, repeats: int, seed: int, block: int | None
) -> dict[str, float]:
    """Medians of the step and of the interleaved matrix products, in this process."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter

    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    size = SIZES[name]
    step = build_step(size, precision, seed, MASKED | {"block_size": block})
    for number in range(WARMUP_STEPS):
        step(number)
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    operands = [torch.randn(n, n).to(DTYPES[precision]) for n in GEMM_SIZES]
    for a in operands:
        torch.mm(a, a)
    full = build_step(size, precision, seed) if block else None
    if full:
        full(0)
    steps: list[float] = []
    others: list[float] = []
    products: list[list[float]] = [[] for _ in operands]
    for number in range(repeats):
        steps.append(timed(lambda number=number: step(WARMUP_STEPS + number)))
        if full:
            others.append(timed(lambda number=number: full(1 + number)))
        for a, times in zip(operands, products, strict=True):
            times.append(timed(lambda a=a: torch.mm(a, a)))
    peak = max(
        2.0 * n**3 / statistics.median(times) for n, times in zip(GEMM_SIZES, products, strict=True)
    )
    seconds = statistics.median(steps)
    useful = size.tokens * size.useful_flops(block) / seconds
    return {
        "step_seconds": seconds,
        "step_seconds_all": steps,
        "tokens_per_second": size.tokens / seconds,
        "useful_gflops": useful / 1e9,
        "gemm_peak_gflops": peak / 1e9,
        "fraction_of_peak": useful / peak,
        "peak_memory_mb": peak_memory,
        "ratio": seconds / statistics.median(others) if others else 1.0,
    }


def measure_in_fresh_process(
    name: str, precision: str, threads: int, repeats: int, seed: int, block: int | None
) -> dict[str, float]:
    """`measure`, where nothing was allocated before."""
    job = json.dumps([name, precision, threads, repeats, seed, block])
    command = [sys.executable, __file__, "--measure", job]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"measuring {name} {precision} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def cpu_model() -> str:
    """Name and notable instruction sets of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = known.get("flags", "").split()
    notable = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([known.get("model name", platform.processor()), *notable])


def origin() -> dict[str, str]:
    """Return the versions, the processor and the date of a result."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "torch": torch.__version__, "cpu": cpu_model()}


HEADER = (
    f"{'size':6}{'type':6}{'tokens/CPU-s':>13}{'useful GFLOP/s':>16}{'GEMM GFLOP/s':>14}"
    f"{'fraction':>10}{'ratio':>7}{'peak MB':>9}{'2 threads tokens/s':>20}{'fraction':>10}"
)


def line(row: dict) -> str:
    one, two = row["one_thread"], row["two_threads"]
    return (
        f"{row['size']:6}{row['precision']:6}{one['tokens_per_second']:13.0f}"
        f"{one['useful_gflops']:16.1f}{one['gemm_peak_gflops']:14.1f}"
        f"{one['fraction_of_peak']:10.3f}{one['ratio']:7.2f}{one['peak_memory_mb']:9.0f}"
        f"{two['tokens_per_second']:20.0f}{two['fraction_of_peak']:10.3f}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, help="timed steps per row; default 5 tiny, 3 small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--block", type=int, help="tokens per block; default: the whole sequence")
    parser.add_argument(
        "--output", type=Path, help="default: results/speed.json, speed_blocks.json"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        print(json.dumps(measure(*json.loads(arguments.measure))))
        return
    print(HEADER)
    rows = []
    for name in arguments.sizes:
        for precision in arguments.precisions:
            job = (arguments.repeats or REPEATS[name], arguments.seed, arguments.block)
            row = {"size": name, "precision": precision}
            row["one_thread"] = measure_in_fresh_process(name, precision, 1, *job)
            row["two_threads"] = measure_in_fresh_process(name, precision, 2, *job)
            rows.append(row)
            print(line(row), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": arguments.seed,
        "block": arguments.block,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average_at_end": os.getloadavg(),
        "note": "fractions are of the GEMM peak measured in the same process; one thread is "
        "process-CPU time, two threads wall-clock time",
        "sizes": {name: asdict(SIZES[name]) for name in arguments.sizes},
        "rows": rows,
    }
    file = "results/speed_blocks.json" if arguments.block else "results/speed.json"
    output = arguments.output or Path(__file__).parent / file
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    main()
