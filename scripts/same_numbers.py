"""Compare the numbers of two checkouts, bit for bit, on one machine.

A change of structure must change no number. Both checkouts train the same small models for some
steps, estimate the same bounds and generate the same texts, all through the command line; then each
loads the exports of the other. Timings are left out of the comparison, and renamed keys of
`metrics.jsonl` are given as OLD=NEW. Everything runs on the CPU in float32 with one thread.

    python scripts/same_numbers.py ../before . --rename old_key=new_key
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SETTINGS: dict[str, dict[str, Any]] = {
    "data": {"sequence_length": 32, "sources": [{"source": "python-docs", "max_documents": 40}]},
    "tokenizer": {"kind": "byte"},
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
    "train": {
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "warmup_steps": 5,
        "log_every": 1,
        "checkpoint_every": 15,
        "mixed_precision": "fp32",
    },
    "evaluate": {"every": 15, "max_documents": 2},
    "sample": {"steps": 8, "max_new_tokens": 16},
}
"""What all families share."""

CONDITIONAL = {"adaln": True, "time_conditioning": True}
DIFFUSION: dict[str, dict[str, Any]] = {
    "mdlm": {},
    "sedd": {"objective": {"kind": "sedd"}},
    "udlm": {
        "objective": {"kind": "udlm"},
        "process": "uniform",
        "noise": {"prompts": 0.5, "prompt_dropout": 0.5},
    },
    "gidd": {
        "objective": {"kind": "gidd"},
        "process": "hybrid",
        "schedule": {"kind": "hybrid"},
    },
    "blocks": {"block_size": 8},
    "ar": {"objective": {"kind": "ar"}, "block_size": 1},
    "d3pm": {
        "objective": {"kind": "d3pm"},
        "process": "uniform",
        "timesteps": 20,
        "noise": {"draw": "time"},
    },
    "learned": {"schedule": {"kind": "learned"}, "noise": {"draw": "time"}},
}
"""The `diffusion` section of each family."""

UNCONDITIONAL = ("mdlm", "blocks", "ar")

ESTIMATORS: dict[str, list[list[str]]] = {
    "mdlm": [["masked_count"], ["time"], ["balanced"], ["any_order"], ["importance"]],
    "sedd": [["masked_count"], ["time"]],
    "udlm": [["masked_count"], ["time"]],
    "gidd": [["masked_count"], ["time"]],
    "blocks": [["masked_count"], ["any_order"], ["time"]],
    "ar": [["chain_rule"]],
    "d3pm": [["finite_t"]],
    "learned": [["masked_count"]],
}

MASKED = ["ancestral", "first_hitting", "confidence", "threshold", "entropy_bound", "remask"]
RULES: dict[str, list[str]] = {
    "mdlm": MASKED,
    "sedd": ["ancestral", "euler", "tweedie", "confidence"],
    "udlm": ["ancestral", "predictor_corrector"],
    "gidd": ["ancestral", "predictor_corrector"],
    "blocks": MASKED,
    "ar": ["ancestral", "first_hitting"],
    "d3pm": ["ancestral"],
    "learned": ["ancestral"],
}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": "0.9:0.5", "top_p": 0.9, "repetition_penalty": 1.2},
    "pattern": {"regex": "[a-z ]+"},
    "banned": {"ban": ["e"], "top_k": 40},
    "guided": {"guidance": 1.5},
}
NOT_COMPARED = (
    "seconds",
    "per_second",
    "time",
    "memory",
    "data_wait",
    "version",
    "commit",
    "path",
    "device",
)


class Checkout:
    """A checkout of textdiff, run as a user would."""

    def __init__(self, folder: Path, work: Path):
        self.folder = folder.resolve()
        self.work = work
        work.mkdir(parents=True)

    def run(self, *words: str) -> str:
        """Return what `textdiff WORDS` prints.

        Raises:
            SystemExit: it failed.
        """
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        command = [sys.executable, "-m", "textdiff", *words]
        done = subprocess.run(
            command, cwd=self.work, env=os.environ | threads, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{self.folder}: {' '.join(words)}\n{done.stderr}")
        return done.stdout

    def train(self, family: str, steps: int) -> Path:
        """Return the export of a model of that family after some steps."""
        config = copy.deepcopy(SETTINGS) | {"diffusion": DIFFUSION[family], "run": {"dir": family}}
        config["train"]["steps"] = steps
        if family not in UNCONDITIONAL:
            config["model"] |= CONDITIONAL
        path = self.work / f"{family}.yaml"
        path.write_text(yaml.safe_dump(config))
        self.run("train", str(path))
        return self.work / family / "export"

    def bound(self, export: Path, text: Path, options: list[str]) -> Any:
        """Return everything that `perplexity --json` says."""
        estimator, *rest = options
        words = ["perplexity", str(export), str(text), "--estimator", estimator, *rest, "--json"]
        return json.loads(self.run(*words))

    def texts(self, export: Path, requests: list[dict[str, Any]], *flags: str) -> list[Any]:
        """Return the lines that `generate --input` writes."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        prompts, output = folder / "prompts.jsonl", folder / "texts.jsonl"
        prompts.write_text("".join(json.dumps(request) + "\n" for request in requests))
        words = ["generate", str(export), "--input", str(prompts), "--output", str(output)]
        self.run(*words, *flags)
        return [json.loads(line) for line in output.read_text().splitlines()]


def requests(family: str) -> list[dict[str, Any]]:
    """Return a request for every rule under every variant."""
    common = {"max_new_tokens": 16, "steps": 6}
    return [
        {"id": f"{rule}, {name}", "prompt": prompt, "rule": rule, **common, **variant}
        for rule in RULES[family]
        for name, variant in VARIANTS.items()
        for prompt in ("The file", "a [MASK:6] of")
        if name in ("plain", "warm") or family in ("mdlm", "blocks", "udlm")
    ]


def differences(old: Any, new: Any, where: str, renames: dict[str, str]) -> list[str]:
    """Return the places where two values differ; numbers have to be equal bit for bit."""
    if isinstance(old, dict) and isinstance(new, dict):
        old = {renames.get(key, key): value for key, value in old.items()}
        keys = [key for key in old if not any(part in key for part in NOT_COMPARED)]
        lost = [f"{where}.{key}: only in the old checkout" for key in keys if key not in new]
        return lost + [
            line
            for key in keys
            if key in new
            for line in differences(old[key], new[key], f"{where}.{key}", renames)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for index, (a, b) in enumerate(zip(old, new, strict=True))
            for line in differences(a, b, f"{where}[{index}]", renames)
        ]
    same = old == new or (old != old and new != new)
    return [] if same else [f"{where}: {old!r:.60} against {new!r:.60}"]


def compare(
    old: Checkout, new: Checkout, family: str, args: argparse.Namespace
) -> tuple[int, list[str]]:
    """Return how many results were compared for a family, and how they differ."""
    text = args.text
    exports = {checkout: checkout.train(family, args.steps) for checkout in (old, new)}
    rows = [
        [json.loads(line) for line in (export.parent / "metrics.jsonl").read_text().splitlines()]
        for export in exports.values()
    ]
    found, count = differences(*rows, f"{family} metrics", args.renames), len(rows[0])
    for options in ESTIMATORS[family]:
        bounds = [checkout.bound(export, text, options) for checkout, export in exports.items()]
        # Each reads what the other wrote.
        crossed = [old.bound(exports[new], text, options), new.bound(exports[old], text, options)]
        for pair in (bounds, crossed):
            found += differences(*map(_without_names, pair), f"{family} {options[0]}", {})
        count += 2
    asked = requests(family)
    for flags in ((), ("--cache", "on")) if family == "blocks" else ((),):
        texts = [checkout.texts(export, asked, *flags) for checkout, export in exports.items()]
        failed = [row for row in texts[0] if "error" in row]
        if failed:
            raise SystemExit(f"{family}: {failed[0]}")
        found += differences(*texts, f"{family} texts {' '.join(flags)}", {})
        count += len(texts[0])
    return count, found


def _without_names(record: dict[str, Any]) -> dict[str, Any]:
    """A result without the names of model, command and machine."""
    return {k: v for k, v in record.items() if k not in ("model", "command", "provenance")}


def main() -> int:
    """Compare two checkouts; return 1 if any number differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--families", nargs="+", default=list(DIFFUSION), choices=list(DIFFUSION))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rename", nargs="*", default=[], metavar="OLD=NEW")
    args = parser.parse_args()
    args.renames = dict(word.split("=", 1) for word in args.rename)
    total: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        args.text = work / "text.txt"
        args.text.write_text((args.old / "LICENSE").read_text()[:900])
        old, new = Checkout(args.old, work / "old"), Checkout(args.new, work / "new")
        for family in args.families:
            count, found = compare(old, new, family, args)
            total += found
            print(f"{family}: {count} results compared, {len(found)} differ", flush=True)
            for line in found[:20]:
                print(f"  {line}")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
