"""Cost of the exact likelihood of a decoding rule against that of the bound at one precision.

    python evals/policy_cost.py held_out.jsonl runs/full/export runs/b4/export [--documents 64]

The cost of the bound is that of as many replicates as bring the 95 % interval of the perplexity of
these documents within `--precision` on either side, but at least 8. It is scaled from that of
`--replicates`, as the error falls with the root of their number. From 32 of them the error is known
within some 13 %, the cost within some 25 %. The likelihood of a rule has no such error. Rows are
network rows. In blocks, a row of the bound is a whole text twice (clean and noisy), and a row of a
rule is one block beside a cache; CPU-seconds compare the two.
"""

import argparse
import json
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from speed import cpu_model

from textdiff import TextDiffusion
from textdiff.data.text_files import read_texts
from textdiff.export.records import code_record, model_record

ROOT = Path(__file__).resolve().parent


def ways(size: int, replicates: int) -> dict[str, dict[str, Any]]:
    """Return estimators with their options: the bound twice, and rules by tokens per call."""
    rule: dict[str, Any] = {"estimator": "policy", "rule": "confidence"}
    return {
        "masked_count": {"estimator": "masked_count", "replicates": replicates},
        "balanced": {"estimator": "balanced", "replicates": replicates},
        "policy, 1 token per call": rule | {"steps": size},
        "policy, 2 tokens per call": rule | {"steps": size // 2},
        "policy, 4 tokens per call": rule | {"steps": size // 4},
    }


def measured(
    model: TextDiffusion, texts: list[str], options: dict[str, Any], precision: float
) -> dict[str, Any]:
    """Return what was measured, and the cost at a precision."""
    start = time.process_time()
    estimates = model.estimate(texts, **options)
    seconds, bound = time.process_time() - start, estimates.bound()
    low, high = bound.interval()
    half_width = (high - low) / 2  # of the log of the perplexity, and so relative to it
    scale = 1.0
    if half_width:
        scale = max((half_width / precision) ** 2, 8 / bound.replicates)
    return {
        "rows_at_precision": round(scale * estimates.rows),
        "cpu_seconds_at_precision": scale * seconds,
        "nats_per_token": bound.mean,
        "stderr": bound.stderr,
        "half_width": half_width,
        "replicates": bound.replicates,
        "rows": estimates.rows,
        "cpu_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--replicates", type=int, default=32)
    parser.add_argument("--precision", type=float, default=0.005)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "policy_cost.json")
    job = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    texts = read_texts([job.text])[: job.documents]
    models = []
    for name in job.models:
        model = TextDiffusion.from_pretrained(name, "cpu")
        model.estimate(texts[:1])  # kernels are chosen at their first call
        size = model.family.block_size or model.context
        found: dict[str, Any] = {}
        for way, options in ways(size, job.replicates).items():
            found[way] = row = measured(model, texts, options, job.precision)
            print(
                f"{name:24} {way:28}{row['nats_per_token']:8.4f} nats "
                f"{row['rows_at_precision']:8} rows {row['cpu_seconds_at_precision']:8.1f} s",
                flush=True,
            )
        origin = {"block_size": model.family.block_size, **model_record(model.folder)}
        models.append({"model": name, **origin, "ways": found})
    record = {
        "what": "cost of the bound at one precision (95 %), and of exact likelihoods",
        "command": shlex.join(["python", "evals/policy_cost.py", *sys.argv[1:]]),
        "seed": 0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "threads": 1,
        "code": code_record(),
        "documents": len(texts),
        "precision": job.precision,
        "replicates": job.replicates,
        "models": models,
    }
    job.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
