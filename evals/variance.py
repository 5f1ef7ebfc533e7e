"""Monte-Carlo variance of every estimator of the bound, per network row, on a trained model.

    python evals/variance.py [MODEL TEXT] [--cases text windows] [--windows 16] [--repetitions 40]

Without arguments it trains `configs/shakespeare-char.yaml` first, on
`$TEXTDIFF_DATA/tinyshakespeare/input.txt` if that is set, else on the hub's copy. Estimators that
do not fit the model are left out. Two cases: `windows`, where every window is a document of its
own (the variance is the mean over documents), and `text`, where all
windows are one document, so that estimators can stratify over them. The cost is the network rows of
an estimate of 8 replicates, a pilot included; `gain` is how much smaller variance times rows is
than that of `time` as published: one time per row in [0.001, 1], stratified over all windows.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import torch

from textdiff.data.encode import encode_documents
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.stopping import LEAST_DRAWS, MIN_REPLICATES
from textdiff.likelihood.windows import Windows, cut_windows
from textdiff.pipeline import TextDiffusion

ROOT = Path(__file__).resolve().parent.parent

# Estimator, its options, and repetitions: enough for about 10 % of the variance.
ROWS: dict[str, list[tuple[str, dict, int]]] = {
    "text": [
        ("time", {"complete": False}, 600),
        ("balanced", {"samples": 8}, 160),
        ("balanced", {"samples": 16}, 160),
        ("masked_count", {"samples": 1}, 400),
        ("masked_count", {"samples": 2}, 300),
        ("masked_count", {"samples": 8}, 60),
    ],
    "windows": [
        ("time", {"complete": False}, 160),
        ("time", {}, 80),
        ("finite_t", {"timesteps": 128}, 160),
        ("masked_count", {"samples": 1}, 160),
        ("masked_count", {"samples": 2}, 160),
        ("masked_count", {"samples": 8}, 24),
        ("balanced", {"samples": 1}, 80),
        ("balanced", {"samples": 8}, 24),
        ("balanced", {"samples": 16}, 16),
        ("any_order", {}, 8),
        ("importance", {"orders": 1}, 8),
    ],
}


def train(folder: Path) -> tuple[Path, Path]:
    """Trains the small character model; returns its export and its validation text."""
    config = ROOT / "configs/shakespeare-char.yaml"
    words = [sys.executable, "-m", "textdiff", "train", str(config), f"--run.dir={folder}"]
    if data := os.environ.get("TEXTDIFF_DATA"):
        words.append(f"--data.sources.0.source={data}/tinyshakespeare/input.txt")
    subprocess.run(words, check=True, stdout=sys.stderr)
    return folder / "export", folder / "validation.jsonl"


def sample_windows(held: TextDiffusion, path: Path, count: int, joined: bool) -> Windows:
    """Windows spread evenly over the text: one document, or one each."""
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    length = held.model.context
    whole = [ids for ids in encode_documents(held.tokenizer, texts) if len(ids) >= length]
    windows = [
        ids[i : i + length] for ids in whole for i in range(0, len(ids) - length + 1, length)
    ]
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    cut = cut_windows(chosen, ["?"] * count, length, held.family.process.vocabulary.clean.cpu())
    if not joined:
        return cut
    return Windows(
        cut.tokens,
        torch.zeros_like(cut.document),
        torch.arange(count),
        cut.document_tokens.sum(0, keepdim=True),
        cut.document_bytes.sum(0, keepdim=True),
    )


def measure(held: TextDiffusion, windows: Windows, row: tuple[str, dict, int], seed: int) -> dict:
    """Variance of one replicate and rows per window and replicate."""
    name, options, replicates = row
    found = estimate(
        held.model,
        held.family,
        windows,
        estimator=name,
        seed=seed,
        replicates=replicates,
        **options,
    )
    pilot = pilot_rows(held, windows, row, seed)
    rows = (found.rows - pilot) / replicates / len(windows.tokens)
    cost = rows + pilot / len(windows.tokens) / MIN_REPLICATES
    documents = len(windows.document_tokens)
    variance = float(found.nats.var(0).sum()) / len(windows.tokens)  # nats ** 2 per window
    return {
        "estimator": name,
        "options": options,
        "replicates": replicates,
        "rows_per_window": cost,
        "variance": variance,
        "variance_times_rows": variance * cost,
        "relative_error": math.sqrt(2.0 / (replicates - 1) / documents),
        "nats_per_token": found.bound().mean,
        "stderr": found.bound().stderr,
    }


def pilot_rows(
    held: TextDiffusion, windows: Windows, row: tuple[str, dict, int], seed: int
) -> float:
    """Rows that do not recur with every replicate, by two estimates of different lengths."""
    name, options, _ = row
    if name != "balanced":
        return 0.0
    counts = []
    few = Windows(
        windows.tokens[:1],
        windows.document[:1],
        windows.index[:1],
        windows.document_tokens[:1],
        windows.document_bytes[:1],
    )
    for replicates in (LEAST_DRAWS, 2 * LEAST_DRAWS):  # fewer may be raised for one window
        counts.append(
            estimate(
                held.model,
                held.family,
                few,
                estimator=name,
                seed=seed,
                replicates=replicates,
                **options,
            ).rows
        )
    return (2 * counts[0] - counts[1]) * len(windows.tokens)


def table(
    held: TextDiffusion, path: Path, cases: list[str], count: int, seed: int, most: int | None
) -> dict[str, list[dict]]:
    result = {}
    for case in cases:
        windows = sample_windows(held, path, count, case == "text")
        found = []
        for name, options, repetitions in ROWS[case]:
            row = (name, options, min(repetitions, most or repetitions))
            try:
                found.append(measure(held, windows, row, seed))
            except ConfigError as error:
                print(f"{case:8} {name:13} left out: {error}", flush=True)
                continue
            reference = found[0]["variance_times_rows"]
            found[-1]["gain"] = reference / found[-1]["variance_times_rows"]
            print(
                f"{case:8} {row[0]:13} {row[1]!s:20} {found[-1]['rows_per_window']:7.2f} rows "
                f"variance {found[-1]['variance']:9.1f} gain {found[-1]['gain']:6.2f} "
                f"(± {100 * found[-1]['relative_error']:.0f} %)",
                flush=True,
            )
        result[case] = found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="export directory of a small model")
    parser.add_argument("text", nargs="?", type=Path, help="jsonl text to score")
    parser.add_argument("--cases", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repetitions", type=int, help="at most so many of each estimate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/variance.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, text = arguments.model, arguments.text
        if model is None or text is None:
            model, text = train(Path(folder) / "run")
        held = TextDiffusion.from_pretrained(model)
        results = table(
            held, text, arguments.cases, arguments.windows, arguments.seed, arguments.repetitions
        )
    own = arguments.model is None
    record = {
        "what": "Monte-Carlo variance (nats ** 2 per window and replicate) of estimates of one "
        "bound, and its product with the network rows that they take",
        "model": "configs/shakespeare-char.yaml, 1000 steps"
        if own
        else held.model.config.diffusion,
        "command": "python " + shlex.join(["evals/variance.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
