"""Adapting a language model: the bound of stories260K as a block-diffusion model, by recipe.

    TEXTDIFF_DATA=... python evals/adaptation.py [--rows blocks-4 random ...] [--seeds 0]

The corpus is drawn from the language model itself (`sampled_corpus.py`, some 5 minutes; --corpus
keeps it): 8,000 texts of 127 tokens and the end of text to train on, 300 others to measure. Every
run takes 400 steps of 16 rows, in three minutes of one core. `blocks-4` is the setting of
`adapt-stories.yaml`; other rows change what their name says. Bounds are of the 300 texts in nats
per token, by the default estimator, 8 replicates; other 300 texts differ by some 0.05.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINED, HELD_OUT = 8000, 300
SHIFT = {"diffusion.objective.shift": "true"}
MUON = {"train.optimizer": "muon"}
MUON_SLOW = {**MUON, "train.muon-learning-rate": "0.01"}
COMPLEMENTARY = {"diffusion.noise.complementary": "true"}
ROWS: dict[str, dict[str, str]] = {
    "blocks-4": {},
    "blocks-8": {"diffusion.block-size": "8"},
    "blocks-16": {"diffusion.block-size": "16"},
    "full": {"diffusion.block-size": "null"},
    "muon": MUON,
    "muon-slow": MUON_SLOW,
    "shift": SHIFT,
    "complementary": COMPLEMENTARY,
    "co-loss": {"diffusion.objective.ar-weight": "0.2"},
    "shift-co-loss": {**SHIFT, "diffusion.objective.ar-weight": "0.2"},
    "shift-complementary": {**SHIFT, **COMPLEMENTARY},
    "shift-complementary-muon": {**SHIFT, **COMPLEMENTARY, **MUON_SLOW},
    "lora": {"train.lora.rank": "8", "train.lora.alpha": "16", "train.learning-rate": "0.01"},
    "random": {"train.init-from": "null", "train.learning-rate": "3e-3"},
}


def draw(model: Path, folder: Path) -> None:
    """Writes train.jsonl and held_out.jsonl, unless they are there."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    if held_out.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = str(TRAINED + HELD_OUT)
    program = str(ROOT / "evals" / "sampled_corpus.py")
    words = [sys.executable, program, str(model), str(folder / "all.jsonl"), "--texts", texts]
    subprocess.run(words, check=True, stdout=sys.stderr)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    train.write_text("".join(lines[:TRAINED]))
    held_out.write_text("".join(lines[TRAINED : TRAINED + HELD_OUT]))


def command(row: str, seed: int, model: Path, folder: Path, run: Path) -> list[str]:
    flags = {
        "run.dir": str(run),
        "run.seed": str(seed),
        "data.sources.0.source": str(folder / "train.jsonl"),
        "data.cache-dir": str(folder / "cache"),
        "model.path": str(model),
        "tokenizer.path": str(model),
        "train.init-from": f"hf:{model}",
    } | ROWS[row]
    words = [sys.executable, "-m", "textdiff", "train", str(ROOT / "evals/adapt-stories.yaml")]
    return words + [f"--{key}={value}" for key, value in flags.items()]


def measure(row: str, seed: int, model: Path, folder: Path) -> dict:
    """Trains once; returns the bound of the held-out texts."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        words = command(row, seed, model, folder, run)
        subprocess.run(words, check=True, stdout=sys.stderr, env=one_thread)
        score = [sys.executable, "-m", "textdiff", "perplexity", str(run / "export")]
        score += [str(folder / "held_out.jsonl"), "--json"]
        done = subprocess.run(score, check=True, stdout=subprocess.PIPE, env=one_thread, text=True)
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    bound = json.loads(done.stdout)
    shown = shlex.join(words[1:]).replace(str(ROOT) + "/", "").replace(str(model), "MODEL")
    return {
        "row": row,
        "seed": seed,
        "nats_per_token": bound["mean"],
        "stderr": bound["stderr"],
        "stderr_over_texts": bound["text_stderr"],
        "curve": {x["step"]: x["bound_nats"] for x in lines if "bound_nats" in x},
        "training_tokens": max(x.get("tokens", 0) for x in lines),
        "tokens_per_second": [x["tokens_per_second"] for x in lines if "loss" in x][-1],
        "command": "python " + shown.replace(str(folder), "CORPUS").replace(scratch, "TMP"),
    }


def save(output: Path, result: dict, model: Path) -> None:
    """Adds a run to the results, in place of an earlier one of the same row and seed."""
    import torch
    from speed import cpu_model

    before = json.loads(output.read_text()) if output.exists() else {"runs": []}
    key = (result["row"], result["seed"])
    runs = [r for r in before["runs"] if (r["row"], r["seed"]) != key] + [result]
    runs.sort(key=lambda r: (list(ROWS).index(r["row"]), r["seed"]))
    record = {
        "what": "bound on 300 held-out texts after 400 steps of 16 x 128 tokens, nats per token",
        "model": model.name,
        "corpus": f"evals/sampled_corpus.py --texts {TRAINED + HELD_OUT}, seed 0",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "runs": runs,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--corpus", type=Path, help="folder that the corpus is kept in")
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/adaptation.json")
    arguments = parser.parse_args()
    data = os.environ.get("TEXTDIFF_DATA")
    if not data:
        sys.exit("set TEXTDIFF_DATA to a folder that holds stories260K")
    model = Path(data).resolve() / "stories260K"
    with tempfile.TemporaryDirectory() as scratch:
        folder = (arguments.corpus or Path(scratch)).resolve()
        draw(model, folder)
        for seed in arguments.seeds:
            for row in arguments.rows:
                result = measure(row, seed, model, folder)
                save(arguments.output, result, model)
                print(f"{row:16} seed {seed} {result['nats_per_token']:.4f} nats/token", flush=True)


if __name__ == "__main__":
    main()
