"""Self-conditioning against none, in equal training time: bounds and texts.

    TEXTDIFF_DATA=... python evals/self_conditioning.py [--families mdlm udlm blocks] [--seeds 0 1]
        [--seconds 150]

Both networks of a family train for the same process-CPU seconds of one thread. Steps of the two are
timed in turn, and their number follows from the medians. Held-out text is cut into windows of 128
characters, each of which is scored and counts as a document.

- `bits`: the bound, in bits per character, under common noise. Its network is called twice per
  sample with self-conditioning.
- `policy_bits`: the exact likelihood of what rule `confidence` writes in 8, 16 and 32 calls, each
  of which reads the prediction of the one before. Uniform noise has none.
- `known_words`: share of the words in generated texts that occur in the training text, by calls of
  the ancestral rule.
- `known_pairs`: the same of neighbouring pairs of words.

Errors are those over windows (`policy_bits`), of the draws (`bits`), and binomial (words).
"""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from speed import cpu_model
from words import pairs, share, words

from textdiff import TextDiffusion
from textdiff.config import Config
from textdiff.config.reading import load
from textdiff.data.corpus import prepare_corpus
from textdiff.data.document_stream import iterate_texts
from textdiff.data.sources import load_documents
from textdiff.data.split import split_documents
from textdiff.train.distributed import make_accelerator
from textdiff.train.reporter import Reporter
from textdiff.train.trainer import Trainer

FOLDER = Path(__file__).resolve().parent
FAMILIES: dict[str, list[str]] = {
    "mdlm": ["--diffusion.objective.loss-weight=ce"],
    "udlm": [
        "--diffusion.objective",
        "{kind: udlm}",
        "--diffusion.process=uniform",
        "--model.adaln=true",
        "--model.time-conditioning=true",
    ],
    "blocks": ["--diffusion.objective.loss-weight=ce", "--diffusion.block-size=16"],
}
CALLS = (8, 16, 32)
LENGTH, WINDOWS, POLICY_WINDOWS, TEXTS = 128, 64, 48, 32
TIMED, WARMED = 24, 3  # steps of each network


def config_of(family: str, conditioned: bool, seed: int, folder: Path, steps: int = 100) -> Config:
    source = Path(os.environ["TEXTDIFF_DATA"]) / "tinyshakespeare" / "input.txt"
    words = [
        f"--run.dir={folder}",
        f"--run.seed={seed}",
        f"--train.steps={steps}",
        f"--data.sources.0.source={source}",
        f"--data.cache-dir={folder.parent / 'cache'}",
        f"--model.self-conditioning={str(conditioned).lower()}",
    ]
    return load(FOLDER / "self_conditioning.yaml", [*words, *FAMILIES[family]])


def trainer_of(config: Config) -> Trainer:
    corpus = prepare_corpus(config.data, config.tokenizer, config.run.seed)
    return Trainer(config, corpus, make_accelerator(config), Reporter(), "never")


def step_seconds(family: str, folder: Path) -> dict[bool, float]:
    """Median CPU-seconds of a step without and with self-conditioning, timed in turn."""
    configs = {c: config_of(family, c, 0, folder / f"timed-{c}") for c in (False, True)}
    runs = {c: trainer_of(config) for c, config in configs.items()}
    batches = {c: run.batches.loader(0, TIMED + WARMED) for c, run in runs.items()}
    seconds: dict[bool, list[float]] = {c: [] for c in runs}
    for number in range(TIMED + WARMED):
        for conditioned, run in runs.items():
            begin = time.process_time()
            run._step(batches[conditioned], [])
            if number >= WARMED:
                seconds[conditioned].append(time.process_time() - begin)
    return {c: statistics.median(found) for c, found in seconds.items()}


def held_out_windows(config: Config) -> tuple[list[str], str]:
    """Windows of the held-out text, and the training text."""
    (source,) = config.data.sources
    split = split_documents(load_documents(source), config.data.validation)
    text = "".join(iterate_texts(split.validation))
    windows = [text[i : i + LENGTH] for i in range(0, len(text) - LENGTH, LENGTH)]
    return windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS], "".join(
        iterate_texts(split.train)
    )


def likelihoods(model: TextDiffusion, windows: list[str]) -> dict[str, Any]:
    """Bound, and the exact likelihood of rule `confidence` by calls."""
    bound = model.estimate(windows, seed=0).bound()
    found: dict[str, Any] = {"bits": [bound.mean / math.log(2), bound.stderr / math.log(2)]}
    if model.family.process.replaces_tokens:
        return found
    segments = LENGTH // (model.family.block_size or LENGTH)
    found["policy_bits"] = {}
    for calls in CALLS:
        options = {"estimator": "policy", "rule": "confidence", "steps": calls // segments}
        exact = model.estimate(windows[:POLICY_WINDOWS], seed=0, **options).bound()
        each = exact.mean / math.log(2), exact.text_stderr / math.log(2)
        found["policy_bits"][str(calls)] = list(each)
    return found


def texts(model: TextDiffusion, training: str) -> dict[str, Any]:
    """Shares of words and pairs of words that the training text has, by calls."""
    known = words(training)
    sets = set(known), set(pairs(known))
    segments = LENGTH // (model.family.block_size or LENGTH)
    found: dict[str, Any] = {"known_words": {}, "known_pairs": {}}
    for calls in CALLS:
        drawn = model.generate("", num_samples=TEXTS, seed=1, steps=calls // segments)
        samples = [words(text)[1:-1] for text in drawn.texts]
        units = [w for s in samples for w in s], [p for s in samples for p in pairs(s)]
        for name, items, all_ in zip(("known_words", "known_pairs"), units, sets, strict=True):
            rate = share(items, all_)
            found[name][str(calls)] = [rate, math.sqrt(rate * (1.0 - rate) / max(1, len(items)))]
        found.setdefault("network_calls", {})[str(calls)] = drawn.calls
        found["text"] = drawn.texts[0]
    return found


def one_run(family: str, conditioned: bool, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    config = config_of(family, conditioned, seed, folder / f"{family}-{conditioned}-{seed}", steps)
    trainer, losses = trainer_of(config), []
    begin = time.process_time()
    batches = trainer.batches.loader(0, steps)
    for _ in range(steps):
        trainer._step(batches, losses)
    seconds = time.process_time() - begin
    windows, training = held_out_windows(config)
    model = trainer.state.exported
    model.model.eval()
    with trainer.state.averaged():
        measured = likelihoods(model, windows) | texts(model, training)
    return {
        "family": family,
        "self_conditioning": conditioned,
        "seed": seed,
        "steps": steps,
        "run_cpu_seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "loss": float(torch.stack(losses[-50:]).mean()),
        **measured,
    }


def add(output: Path, rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Append rows to the result, which other processes write as well."""
    with FileLock(f"{output}.lock"):
        record = json.loads(output.read_text()) if output.exists() else {"rows": []}
        record = {
            "command": "python evals/self_conditioning.py",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "cpu": cpu_model(),
            "seconds": arguments.seconds,
            "windows": WINDOWS,
            "policy_windows": POLICY_WINDOWS,
            "texts": TEXTS,
            "rows": sorted(
                record["rows"] + rows,
                key=lambda row: (row["family"], row["seed"], row["self_conditioning"]),
            ),
        }
        output.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument(
        "--output", type=Path, default=FOLDER / "results" / "self_conditioning.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = {family: step_seconds(family, folder) for family in arguments.families}
        print(steps, flush=True)
        every = itertools.product(arguments.seeds, arguments.families, (False, True))
        for seed, family, conditioned in every:
            step = steps[family][conditioned]
            row = one_run(family, conditioned, seed, round(arguments.seconds / step), folder)
            row = {"step_cpu_seconds": round(step, 4), **row}
            print(json.dumps(row, ensure_ascii=False), flush=True)
            add(arguments.output, [row], arguments)
    Path(f"{arguments.output}.lock").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
