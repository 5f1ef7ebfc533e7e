"""Masked positions of the process that has most, over their mean: rows in order, and dealt.

    python evals/balance.py

Noise levels are those of the first steps of seed 0, by count. Processes wait for the largest of
each micro-step; what is shown is the mean over micro-steps.
"""

import argparse
import json
from pathlib import Path

import torch

from textdiff.diffusion.randomness import level_uniforms
from textdiff.train.balance import deal_rows

SEED, STEPS, LENGTH, ACCUMULATION = 0, 30, 1024, 2
CASES = [(8, 8, 1), (8, 32, 1), (64, 8, 1), (8, 32, 64)]  # processes, rows of each, blocks


def excess(processes: int, rows: int, blocks: int) -> dict[str, float]:
    """Return by how much the largest exceeds the mean, by the way that rows are divided."""
    hands = processes * ACCUMULATION
    ways: dict[str, list[torch.Tensor]] = {"in order": [], "dealt": []}
    for step in range(STEPS):
        levels = level_uniforms(SEED, step, hands * rows * blocks).view(-1, blocks)
        masked = torch.ceil(levels * (LENGTH // blocks)).sum(-1)  # [global batch]
        groups = torch.arange(hands * rows).view(hands, rows), deal_rows(levels.mean(-1), hands)
        for slots, found in zip(groups, ways.values(), strict=True):
            each = masked[slots].sum(-1).view(ACCUMULATION, processes)
            found.append((each.amax(-1) / each.mean(-1)).mean() - 1.0)
    return {way: float(torch.stack(found).mean()) for way, found in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "results" / "balance.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    from speed import origin

    names = "processes", "rows", "blocks"
    rows = [{**dict(zip(names, case, strict=True)), **excess(*case)} for case in CASES]
    for row in rows:
        print(row)
    result = {
        "command": "python evals/balance.py",
        "seed": SEED,
        **origin(),
        "steps": STEPS,
        "length": LENGTH,
        "accumulation": ACCUMULATION,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
