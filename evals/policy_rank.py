"""Do exact likelihoods rank decoding rules as the perplexity of what they write does?

    textdiff evaluate MODEL --suite likelihood-frontier --reference held_out.jsonl \\
        --output likelihood.json
    python evals/policy_rank.py grid likelihood.json grid.yaml
    textdiff evaluate MODEL --suite frontier --judge stories260K --reference held_out.jsonl \\
        --grid grid.yaml --min-new-tokens 127 --output frontier.json
    python evals/policy_rank.py rank likelihood.json frontier.json [--output rank.json]

`grid` writes the settings of a likelihood frontier as a grid of the suite `frontier`. `rank`
compares the two results, setting by setting, by Spearman's rank correlation. The judge should be
the model that the corpus was drawn from (`sampled_corpus.py`): its perplexity is the true one.
Intervals are percentiles over settings drawn with replacement. The p-value is the share of
random permutations that correlate at least as much. Settings of the same likelihood, such as all
orders in one step per block, are one rule and count once. Tokens per call alone rank rules, too.
Correlations with it, and the partial one given it, therefore stand beside.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from speed import cpu_model

DRAWS = 10_000
Column = NDArray[np.float64]


def setting(options: dict[str, Any]) -> str:
    """Return the key under which the two suites share a setting."""
    return json.dumps([options["rule"], options["steps"], options["knobs"]], sort_keys=True)


def grid_of(likelihood: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a likelihood frontier as a grid of the suite `frontier`."""
    points = [
        {"rule": o["rule"], "steps": o["steps"], "temperature": 1.0}
        | {name: [value] for name, value in o["knobs"].items()}
        for o in (point["options"] for point in likelihood["points"])
    ]
    return {"baseline": {"rule": "first_hitting", "temperature": [0.8, 1.0]}, "points": points}


def ranks(values: Column) -> Column:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(x: Column, y: Column) -> float:
    """Return Spearman's rank correlation; NaN where a column is constant."""
    a, b = ranks(x), ranks(y)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread else float("nan")


def partial(x: Column, y: Column, given: Column) -> float:
    """Return the rank correlation of x and y given a third column."""
    xy, xz, yz = spearman(x, y), spearman(x, given), spearman(y, given)
    rest = (1.0 - xz**2) * (1.0 - yz**2)
    return (xy - xz * yz) / rest**0.5 if rest > 1e-12 else float("nan")


def correlation(statistic: Any, *columns: Column) -> dict[str, float]:
    """Return a statistic of columns, its 95 % interval over settings and a permutation p-value."""
    draw, value = np.random.default_rng(0), statistic(*columns)
    count = len(columns[0])
    picks = draw.integers(0, count, (DRAWS, count))
    again = [statistic(*(column[pick] for column in columns)) for pick in picks]
    low, high = np.nanpercentile(again, [2.5, 97.5])
    first, *others = columns
    null = [statistic(first[draw.permutation(count)], *others) for _ in range(DRAWS)]
    p = (1 + sum(abs(n) >= abs(value) - 1e-12 for n in null)) / (DRAWS + 1)
    return {"value": value, "low": float(low), "high": float(high), "p": float(p)}


def compared(likelihood: dict[str, Any], frontier: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of both results and the correlations between them."""
    written = {setting(p["sampling"]): p for p in frontier["points"] if not p["baseline"]}
    rows: list[dict[str, Any]] = []
    distinct = {round(point["nats"] or 0.0, 9): point for point in reversed(likelihood["points"])}
    for point in reversed(distinct.values()):
        other = written.get(setting(point["options"]))
        if other is None or point["impossible"]:
            continue
        figures = other["figures"]
        rows.append(
            {
                "curve": point["curve"],
                "tokens_per_call": point["tokens_per_call"],
                "nats": point["nats"],
                "over_bound": point["over_bound"]["nats"],
                "over_bound_stderr": point["over_bound"]["text_stderr"],
                "generative_perplexity": figures["gen_ppl"],
                "entropy": figures["entropy"],
                "excess": other["excess"],
            }
        )
    names = ("nats", "tokens_per_call")
    nats, speed = (np.array([row[name] for row in rows]) for name in names)
    quality = np.array([row["generative_perplexity"]["value"] for row in rows])
    slow = speed < 1.0 + 1e-9
    return {
        "settings": len(rows),
        "spearman": {
            "nats, generative perplexity": correlation(spearman, nats, quality),
            "tokens per call, generative perplexity": correlation(spearman, speed, quality),
            "nats, generative perplexity, given tokens per call": correlation(
                partial, nats, quality, speed
            ),
        },
        "one_token_per_call": {"settings": int(slow.sum())}
        | ({"spearman": spearman(nats[slow], quality[slow])} if slow.sum() > 2 else {}),
        "points": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("grid", "rank"))
    parser.add_argument("likelihood", type=Path)
    parser.add_argument("other", type=Path, help="grid to write, or the frontier's result")
    parser.add_argument("--output", type=Path)
    job = parser.parse_args()
    likelihood = json.loads(job.likelihood.read_text())
    if job.task == "grid":
        job.other.write_text(yaml.safe_dump(grid_of(likelihood), sort_keys=False))
        return
    frontier = json.loads(job.other.read_text())
    model, other = (r["provenance"]["model_sha256"] for r in (likelihood, frontier))
    if model != other:
        sys.exit("the two results are of different models")
    record = {
        "what": "rank correlation of exact likelihood and generative perplexity over settings",
        "command": shlex.join(["python", "evals/policy_rank.py", *sys.argv[1:]]),
        "seed": 0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "model_sha256": model,
        "block_size": likelihood["block_size"],
        "judge": frontier["judge"]["name"],
        "documents": likelihood["documents"],
        "samples": frontier["points"][0]["sampling"]["num_samples"],
        **compared(likelihood, frontier),
    }
    for name, figure in record["spearman"].items():
        print(f"{name:52} {figure['value']:+.3f} ({figure['low']:+.3f} to {figure['high']:+.3f})")
    if job.output:
        job.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
