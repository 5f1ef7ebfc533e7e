"""Learning on characters: validation bounds on tinyshakespeare after two million characters.

    TEXTDIFF_DATA=... python evals/learning.py [--rows published best] [--seeds 0 1]

`published` is the setting that the official codes were measured in (hidden 192, 4 layers, 4 heads,
L = 128, 1000 steps of 16 rows, dropout 0.1, AdamW 1e-3, linear warm-up, then constant, EMA 0.9999).
Rows named after an objective train it in that setting; where the network must see the noise level,
it has adaptive layer norms on top. `-clipped` rows search their mask rates at steps 250, 500, 750.
`best` is `configs/shakespeare-char.yaml`: the same network size and number of tokens with our
defaults. Bounds are of the whole validation text (the last tenth), averaged weights, by the default
estimator of each family.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Validation figures of the official codes in this setting: bits per character, standard error.
OFFICIAL = {
    "published": (3.325, 0.014),
    "best": (3.325, 0.014),
    "ar": (2.546, 0.035),
    "bd3lm-4": (3.122, 0.019),
    "bd3lm-16": (3.249, 0.016),
    "bd3lm-4-clipped": (3.122, 0.019),
    "bd3lm-16-clipped": (3.249, 0.016),
    "sedd-absorbing": (3.298, 0.014),
}

SETTING = {
    "model.norm": "layernorm",
    "model.qk-norm": "false",
    "model.dropout": "0.1",
    "train.optimizer": "adamw",
    "train.learning-rate": "1e-3",
    "train.warmup-steps": "100",
    "train.lr-schedule": "constant",
    "train.ema-decay": "0.9999",
}
SEES_NOISE = {"model.adaln": "true", "model.time-conditioning": "true"}
SEARCHED = {"noise": {"range": "search"}}


def objective(kind: str, sees_noise: bool, **diffusion: object) -> dict[str, str]:
    """The published setting with another diffusion section."""
    section = {"objective": {"kind": kind}, **diffusion}
    often = {"evaluate.every": "250"} if diffusion.get("noise") == SEARCHED["noise"] else {}
    shown = SEES_NOISE if sees_noise else {}
    return SETTING | {"diffusion": json.dumps(section)} | shown | often


IN_STEPS = {"timesteps": 1000, "noise": {"draw": "time"}}
ROWS: dict[str, dict[str, str]] = {
    "published": SETTING | {"diffusion.objective.loss-weight": "elbo"},
    "best": {},
    "ar": objective("ar", False, block_size=1),
    "bd3lm-4": objective("mdlm", False, block_size=4),
    "bd3lm-16": objective("mdlm", False, block_size=16),
    "bd3lm-4-clipped": objective("mdlm", False, block_size=4, **SEARCHED),
    "bd3lm-16-clipped": objective("mdlm", False, block_size=16, **SEARCHED),
    "sedd-absorbing": objective("sedd", False),
    "d3pm-absorbing": objective("d3pm", False, **IN_STEPS),
    "udlm": objective("udlm", True, process="uniform"),
    "sedd-uniform": objective("sedd", True, process="uniform"),
    "d3pm-uniform": objective("d3pm", True, process="uniform", **IN_STEPS),
    "gidd": objective("gidd", True, process="hybrid", schedule={"kind": "hybrid", "uniform": 0.1}),
}


def command(row: str, seed: int, corpus: Path, run: Path) -> list[str]:
    flags = {"evaluate.every": "100000"} | ROWS[row]
    flags |= {
        "data.sources.0.source": str(corpus),
        "data.cache-dir": str(run.parent / "cache"),
        "run.dir": str(run),
        "run.seed": str(seed),
        "train.mixed-precision": "fp32",
        "train.log-every": "100",
        "train.checkpoint-every": "100000",
        "sample.num-samples": "0",
    }
    words = [sys.executable, "-m", "textdiff", "train", str(ROOT / "configs/shakespeare-char.yaml")]
    return words + [f"--{key}={value}" for key, value in flags.items()]


def measure(row: str, seed: int, corpus: Path, keep: Path | None) -> dict:
    """Trains once; returns the final bound in bits per character."""
    with tempfile.TemporaryDirectory() as folder:
        run = (keep or Path(folder)) / f"{row}_s{seed}" / "run"
        words = command(row, seed, corpus, run)
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, check=True, stdout=sys.stderr, env=one_thread)
        return result(row, seed, corpus, run)


def result(row: str, seed: int, corpus: Path, run: Path) -> dict:
    """What a finished run found."""
    words = command(row, seed, corpus, run)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    bound = [line for line in lines if "bound_nats" in line][-1]
    steps = [line for line in lines if "loss" in line]
    shown = shlex.join(words[1:]).replace(str(run.parent), "TMP").replace(str(ROOT) + "/", "")
    return {
        "row": row,
        "seed": seed,
        "bits_per_character": bound["bound_nats"] / math.log(2),
        "monte_carlo_stderr": bound["bound_stderr"] / math.log(2),
        "training_tokens": steps[-1]["tokens"],
        "command": "python "
        + shown.replace(str(corpus), "$TEXTDIFF_DATA/tinyshakespeare/input.txt"),
    }


def summary(results: list[dict]) -> list[dict]:
    rows = []
    for row in dict.fromkeys(result["row"] for result in results):
        values = [r["bits_per_character"] for r in results if r["row"] == row]
        errors = [r["monte_carlo_stderr"] for r in results if r["row"] == row]
        spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        mean = statistics.mean(values)
        rows.append(
            {
                "row": row,
                "seeds": len(values),
                "bits_per_character": mean,
                "stderr_over_seeds": spread,
                "monte_carlo_stderr": math.sqrt(sum(e * e for e in errors)) / len(errors),
                "official": OFFICIAL.get(row),
                "below_official": OFFICIAL[row][0] - mean if row in OFFICIAL else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--keep", type=Path, help="folder that the runs are kept in")
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/learning.json")
    arguments = parser.parse_args()
    folder = os.environ.get("TEXTDIFF_DATA")
    if not folder:
        sys.exit("set TEXTDIFF_DATA to a folder that holds tinyshakespeare/input.txt")
    corpus = Path(folder) / "tinyshakespeare" / "input.txt"
    lock = threading.Lock()

    def run(row: str, seed: int) -> None:
        found = measure(row, seed, corpus, arguments.keep)
        with lock:
            save(arguments.output, found)

    runs = [(row, seed) for seed in arguments.seeds for row in arguments.rows]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda pair: run(*pair), runs))
    for row in json.loads(arguments.output.read_text())["summary"]:
        official = row["official"]
        print(
            f"{row['row']:16} {row['bits_per_character']:.4f} bits/char "
            f"(± {row['stderr_over_seeds'] or math.nan:.4f} over {row['seeds']} seeds, "
            f"± {row['monte_carlo_stderr']:.4f} Monte Carlo)"
            + (f", official {official[0]} ± {official[1]}" if official else "")
        )


def save(output: Path, result: dict) -> None:
    """Adds a run to the results, in place of an earlier one of the same row and seed."""
    before = json.loads(output.read_text()) if output.exists() else {"runs": []}
    key = (result["row"], result["seed"])
    runs = [r for r in before["runs"] if (r["row"], r["seed"]) != key] + [result]
    runs.sort(key=lambda r: (list(ROWS).index(r["row"]), r["seed"]))
    record = before | {
        "what": "validation bound on tinyshakespeare, characters, 2.05 M training characters",
        "official": OFFICIAL,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "summary": summary(runs),
        "runs": runs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
