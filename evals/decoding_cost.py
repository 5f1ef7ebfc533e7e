"""Cost of full-sequence decoding on a CPU, and the share of it outside the network.

    python evals/decoding_cost.py [--repeats 3] [--only NAME ...]

Networks have random weights; four rows are filled by ancestral sampling of masked diffusion and by
Tweedie's of score entropy. Every network call counts. One thread, process-CPU time; the peak is the
best median of square matrix products timed in between. `tokens_per_gflop`, tokens per CPU-second
over that peak, is what can be compared between machines, and is set beside the official codes' own,
measured in the same way on a Zen 4 CPU whose peak was 70 to 83 GFLOP/s. The cost of
other operations does not scale with that peak, so that the ratio between CPUs of different kinds is
only approximate.

Not every setting was measured with the official codes. At other numbers of steps their time is that
of their calls, which all take the same; at 4 x 256 tokens of the larger network, where 70 % of it
was the network's, that part goes with the network's arithmetic and the rest with the positions.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from generation import timed
from speed import GEMM_SIZES, SIZES, cpu_model

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig

ROWS = 4
OFFICIAL_PEAK = (70.0, 83.0)


@dataclass(frozen=True)
class Case:
    """A sampler and a network.

    Attributes:
        size: which network.
        objective: `mdlm` or `sedd`.
        rule: decoding rule.
        steps: denoising steps.
        official: tokens per CPU-second of the official code's faster sampler, and how it is known.
        bar: how many times that is aimed at.
        length: tokens of a row; None: as many as in training.
    """

    size: str
    objective: str
    rule: str
    steps: int
    official: tuple[float, str]
    bar: float
    length: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a row."""
        return self.length or SIZES[self.size].length


def expected_calls(steps: int, tokens: int) -> float:
    """Network calls of a cache that is valid while none of the tokens changes."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** tokens)


# 67 tokens per CPU-second at 64 steps are 65 calls of all four rows for 1024 tokens.
SECONDS_PER_CALL = 1024 / 67 / 65
CACHED = 1024 / (SECONDS_PER_CALL * expected_calls(1024, 1024))
# 32 tokens per CPU-second at 32 steps are 33 calls for 2048 tokens, 70 % of it the network's time.
SECONDS_PER_LARGE_CALL = 2048 / 32 / 33
SHORTER = replace(SIZES["small"], length=256)
SHARE = SHORTER.useful_flops() * 256 / (SIZES["small"].useful_flops() * 512)
SECONDS_PER_SHORT_CALL = SECONDS_PER_LARGE_CALL * (0.7 * SHARE + 0.3 / 2)

MEASURED = "measured"
BY_CALLS = "the time of its calls at 32 steps, 65 of them"
OUTSIDE_BAR = 0.15
"""Share of the time that may be spent outside the network at 8192 tokens of vocabulary."""

CASES = {
    "mdlm-tiny-64": Case("tiny", "mdlm", "ancestral", 64, (67.0, MEASURED), 1.0),
    "mdlm-tiny-1024": Case(
        "tiny", "mdlm", "ancestral", 1024, (CACHED, "its calls at 64 steps, at expected calls"), 2.5
    ),
    "mdlm-small-32": Case("small", "mdlm", "ancestral", 32, (32.0, MEASURED), 1.35),
    "mdlm-small-64": Case(
        "small", "mdlm", "ancestral", 64, (2048 / SECONDS_PER_LARGE_CALL / 65, BY_CALLS), 1.35
    ),
    "mdlm-small-64-short": Case(
        "small",
        "mdlm",
        "ancestral",
        64,
        (1024 / SECONDS_PER_SHORT_CALL / 65, f"{BY_CALLS}, on half the positions"),
        1.35,
        length=256,
    ),
    "sedd-tiny-64": Case("tiny", "sedd", "tweedie", 64, (78.0, MEASURED), 1.0),
    "sedd-small-32": Case("small", "sedd", "tweedie", 32, (29.0, MEASURED), 1.3),
}


def build(case: Case) -> tuple[TextDiffusionModel, Family]:
    """A network with random weights; that of score entropy sees the noise level."""
    torch.manual_seed(0)
    size = SIZES[case.size]
    mask = size.vocabulary
    score = case.objective == "sedd"
    config = TextDiffusionConfig(
        vocab_size=mask + 1,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.length,
        mask_token_id=mask,
        adaln=score,
        time_conditioning=score,
        attn_implementation="sdpa",
    )
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear", "eps": 1e-3 if score else 0.0},
        "objective": {"kind": case.objective},
        "block_size": None,
    }
    return TextDiffusionModel(config).eval(), build_family(spec, Vocabulary.of(mask + 1, mask))


def walk(
    model: TextDiffusionModel, family: Family, case: Case, seed: int
) -> tuple[float, float, int]:
    """CPU-seconds of one generation, those of the network, and network calls."""
    network = 0.0

    def before(*ignored: object) -> None:
        nonlocal network
        network -= time.process_time()

    def after(*ignored: object) -> None:
        nonlocal network
        network += time.process_time()

    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    calls, start = 0, time.process_time()
    job = Job([[]] * ROWS, [case.tokens] * ROWS, seed=seed)
    config = SamplingConfig(rule=case.rule, steps=case.steps, cache="off")
    for step in Engine(model, family, Request(job, config)).run():
        calls = step.calls
    seconds = time.process_time() - start
    for hook in hooks:
        hook.remove()
    return seconds, network, calls


def measure(name: str, repeats: int) -> dict[str, object]:
    """Medians over generations, with matrix products in between."""
    case = CASES[name]
    model, family = build(case)
    walk(model, family, replace(case, steps=2), 0)
    operands = [torch.randn(n, n) for n in GEMM_SIZES]
    runs, products = [], {n: [] for n in GEMM_SIZES}
    for repeat in range(repeats):
        runs.append(walk(model, family, case, 1 + repeat))
        for operand in operands:
            products[len(operand)].append(timed(lambda a=operand: a @ a))
    peak = max(2 * n**3 / statistics.median(spent) for n, spent in products.items()) / 1e9
    seconds = statistics.median(run[0] for run in runs)
    rate = ROWS * case.tokens / seconds
    official = [case.official[0] / gflops for gflops in OFFICIAL_PEAK]
    return {
        "case": name,
        "tokens": ROWS * case.tokens,
        "steps": case.steps,
        "calls": runs[0][2],
        "tokens_per_cpu_second": round(rate, 2),
        "tokens_per_cpu_second_all": [round(ROWS * case.tokens / run[0], 2) for run in runs],
        "gemm_peak_gflops": round(peak, 1),
        "tokens_per_gflop": round(rate / peak, 4),
        "outside_network": round(1.0 - statistics.median(run[1] / run[0] for run in runs), 4),
        "official_tokens_per_cpu_second": round(case.official[0], 2),
        "official_is": case.official[1],
        "times_official": [round(rate / peak / other, 2) for other in official],
        "bar": case.bar,
    } | ({"outside_bar": OUTSIDE_BAR} if case.size == "small" else {})


def main() -> None:
    """Measures, prints and writes `results/decoding_cost.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    folder = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=folder / "decoding_cost.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(arguments.output.read_text())["rows"] if arguments.output.exists() else []
    rows = {row["case"]: row for row in known}
    for name in arguments.only:
        rows[name] = measure(name, arguments.repeats)
        print(json.dumps(rows[name]), flush=True)
    made = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "OMP_NUM_THREADS=1 python evals/decoding_cost.py",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
    }
    arguments.output.write_text(
        json.dumps({"rows": list(rows.values()), "made": made}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
