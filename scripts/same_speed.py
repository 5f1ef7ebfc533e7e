"""Compare the speed of two checkouts in interleaved pairs, on one machine.

A change of structure must not cost time. Both checkouts train, score and generate with the same
small model through the command line, in turn, each pair in the other order. What a pair compares is
processor time of one thread, start-up left out: that of the same command with next to no work.

    python scripts/same_speed.py ../before . --repeats 7 --output evals/results/same_speed.json
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from same_numbers import SETTINGS

FAMILIES: dict[str, dict[str, Any]] = {"mdlm": {}, "blocks": {"block_size": 8}}
SIZE = {"hidden_size": 128, "num_layers": 4, "num_heads": 4}


def config(diffusion: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a small model."""
    values = copy.deepcopy(SETTINGS) | {"model": SIZE, "diffusion": diffusion}
    values["data"]["sequence_length"] = 128
    values["evaluate"] = {"every": 1000, "max_documents": 1}
    values["sample"] = {"num_samples": 0}
    return values


def cpu_seconds(checkout: Path, words: list[str]) -> float:
    """Run textdiff of a checkout and return the processor time that it took."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "textdiff", *words]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(f"{checkout}: {' '.join(words)}\n{log.read().decode()}")
    return usage.ru_utime + usage.ru_stime


def works(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Return commands by name, each with the same command on next to no work."""
    text, short = folder / "text.txt", folder / "short.txt"
    text.write_text(Path(statistics.__file__).read_text(encoding="utf-8")[:2500], encoding="utf-8")
    short.write_text("def", encoding="utf-8")
    commands = {}
    for name in FAMILIES:
        file, export = str(folder / f"{name}.yaml"), str(folder / name / "export")
        train = ["train", file, "--run.dir", str(folder / "again"), "--resume", "never"]
        score = ["perplexity", export, "--replicates"]
        generate = ["generate", export, "def", "--max-new-tokens", "64", "--num-samples"]
        commands |= {
            f"{name} training": ([*train, "--train.steps", "60"], [*train, "--train.steps", "1"]),
            f"{name} scoring": ([*score, "96", str(text)], [*score, "8", str(short)]),
            f"{name} generation": ([*generate, "96"], [*generate, "1"]),
        }
    return commands


def pairs(
    before: Path, after: Path, work: tuple[list[str], list[str]], repeats: int
) -> list[float]:
    """Return the ratio, after over before, of each pair."""
    ratios = []
    for number in range(repeats):
        order = [before, after] if number % 2 else [after, before]
        net = {c: cpu_seconds(c, work[0]) - cpu_seconds(c, work[1]) for c in order}
        ratios.append(net[after] / net[before])
    return ratios


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="the works whose names contain it")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    before, after = arguments.before.resolve(), arguments.after.resolve()
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, diffusion in FAMILIES.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(config(diffusion)))
            words = ["train", str(folder / f"{name}.yaml"), "--run.dir", str(folder / name)]
            cpu_seconds(before, [*words, "--train.steps", "30"])
        for name, work in works(folder).items():
            if arguments.only not in name:
                continue
            ratios = pairs(before, after, work, arguments.repeats)
            spread = statistics.quantiles(ratios, n=4)
            rows[name] = {"ratio": statistics.median(ratios), "quartiles": [spread[0], spread[2]]}
            print(f"{name:20} {rows[name]['ratio']:.3f}  ({spread[0]:.3f} to {spread[2]:.3f})")
    if arguments.output:
        record = {"command": " ".join(sys.argv), "made": datetime.now(UTC).isoformat()}
        record |= {"repeats": arguments.repeats, "ratios": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
