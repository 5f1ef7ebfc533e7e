"""Stage that interrupts a training run and continues it."""

import json
from pathlib import Path

import torch

from gpu_checks.checks import Check, Checks
from textdiff.cli import main as textdiff
from textdiff.signals import Interruption

RUN = {
    "data.sources": '[{"source": "python-docs", "max_documents": 40}]',
    "data.sequence-length": "64",
    "data.num-workers": "0",
    "tokenizer": '{"kind": "byte"}',
    "model.hidden-size": "64",
    "model.num-layers": "2",
    "model.num-heads": "2",
    "model.gradient-checkpointing": "true",
    "train.global-batch-size": "8",
    "train.micro-batch-size": "4",
    "train.optimizer": "muon",
    "train.deterministic": "true",
    "train.log-every": "1",
    "train.checkpoint-every": "3",
    "train.lr-schedule": "constant",
    "evaluate.every": "6",
    "evaluate.max-documents": "2",
    "sample.num-samples": "0",
}
EXACT = ("loss", "grad_norm", "bound_nats")


def resume(device: torch.device, folder: Path) -> Checks:
    """Compare an interrupted run with an uninterrupted one, bit for bit."""
    (folder / "empty.yaml").write_text("{}\n")
    whole, parts = folder / "whole", folder / "parts"
    for run, steps in ((whole, 6), (parts, 3), (parts, 6)):
        code = train(folder, run, steps)
        if code > 128:  # by a signal, after which it has saved
            raise Interruption(code - 128)
        if code != 0:
            yield Check("3 + 3 steps : 6", None, 0.0, "a run failed, see above")
            return
    rows, others = last_lines(whole), last_lines(parts)
    places = [(at, key) for at in ("training", "evaluation") for key in EXACT]
    changed = sum(rows[at].get(key) != others[at].get(key) for at, key in places)
    yield Check("3 + 3 steps : 6, numbers that differ", float(changed), 0.0)
    weights = [run / "export" / "model.safetensors" for run in (whole, parts)]
    same = weights[0].read_bytes() == weights[1].read_bytes()
    yield Check("3 + 3 steps : 6, weights that differ", 0.0 if same else 1.0, 0.0)


def train(folder: Path, run: Path, steps: int) -> int:
    """Train so many steps, or continue to them; return the exit code."""
    flags = RUN | {
        "train.steps": str(steps),
        "run.dir": str(run),
        "data.cache-dir": str(folder / "cache"),
    }
    words = [f"--{key}={value}" for key, value in flags.items()]
    return textdiff(["train", str(folder / "empty.yaml"), *words])


def last_lines(run: Path) -> dict[str, dict]:
    """Return what a run has logged at its last step: of training, and of the evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["step"] == 6]
    return {"training" if "loss" in row else "evaluation": row for row in last}
