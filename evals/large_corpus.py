"""Start of a run on a large corpus: its order, and the comparison of its files with their hashes.

    python evals/large_corpus.py [--output evals/results/large_corpus.json]

For growing numbers of rows, CPU seconds and memory (tracemalloc) until a worker knows its first 64
rows, by sorting random words and by the permutation that needs no table. And CPU seconds to open
256 MB of tokens with all hashes, and with the sizes and times of the files alone. Every cell is the
least of three.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import cpu_model

from textdiff.data import sequences
from textdiff.data.sequences import Epochs
from textdiff.data.shards import Shard, describe_shards
from textdiff.data.token_stream import TokenStream

ROWS = (2**18, 2**20, 2**22, 2**24)
MEGABYTES, TRIES, SEED = 256, 3, 0


class Rows(Epochs):
    """Rows without tokens."""

    def __init__(self, count: int):
        super().__init__(SEED)
        self.count = count

    def __len__(self) -> int:
        return self.count


def seconds(action: Callable[[], Any]) -> float:
    """Return the least CPU time of some tries."""
    taken = []
    for _ in range(TRIES):
        begin = time.process_time()
        action()
        taken.append(time.process_time() - begin)
    return min(taken)


def peak(action: Callable[[], Any]) -> int:
    tracemalloc.start()
    action()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def order_cost(count: int, most_sorted: int) -> dict[str, float]:
    """Measure the first 64 rows of an order."""
    sequences.MOST_SORTED = most_sorted

    def first() -> None:
        Rows(count).shuffled(range(64))

    return {"cpu_seconds": round(seconds(first), 6), "peak_bytes": peak(first)}


def hash_cost() -> dict[str, float]:
    """Measure the opening of a cache entry."""
    with tempfile.TemporaryDirectory() as name:
        folder, listed = Path(name), {}
        for number in range(8):
            with Shard(folder, number, None, 2**16) as shard:
                shard.write([(np.zeros(MEGABYTES * 2**20 // 16, np.int32), True)])
            os.utime(shard.path, (10**9, 10**9))
            listed[number] = shard.description()
        describe_shards(folder, listed, None)
        all_files = seconds(lambda: TokenStream(folder).damaged())
        changed = seconds(lambda: TokenStream(folder).damaged(changed_only=True))
        size = sum(shard["bytes"] for shard in listed.values())
    return {
        "bytes": size,
        "all_cpu_seconds": round(all_files, 4),
        "changed_cpu_seconds": round(changed, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("evals/results/large_corpus.json"))
    arguments = parser.parse_args()
    order = [
        {
            "rows": count,
            "sorted": order_cost(count, count),
            "permuted": order_cost(count, 0),
        }
        for count in ROWS
    ]
    result = {
        "made": datetime.now(UTC).date().isoformat(),
        "command": "python " + " ".join(["evals/large_corpus.py", *sys.argv[1:]]),
        "seed": SEED,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": cpu_model(),
        "order": order,
        "hashes": hash_cost(),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
