"""Memory and resumption of `textdiff data prepare` on a large synthetic text.

    python evals/prepare.py [--gigabytes 1] [--kinds documents lines line] [--num-proc 1]

Writes a text of that size in three shapes: JSON lines of documents of many lengths, one text file
of many lines, one text file of a single line. Each goes through `textdiff data prepare` with the
byte tokenizer (the most tokens per byte) twice, into empty caches: once undisturbed, once killed by
SIGKILL when half of the tokens are on disk and started again. The record holds the time, the
largest memory of the whole process tree (sampled, summed resident sets; shared pages count once per
process) and whether both caches are equal byte for byte.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from textdiff.export.records import code_record

ROOT = Path(__file__).resolve().parent.parent
SAMPLED_EVERY_SECONDS = 0.2


@dataclass
class Run:
    """One `textdiff data prepare`, to its end or to its kill."""

    seconds: float
    peak_bytes: int
    shards_found: int
    code: int


def vocabulary(rng: random.Random) -> list[str]:
    letters = "etaoinshrdlucmfwypvbgk"
    return ["".join(rng.choices(letters, k=rng.randrange(1, 10))) for _ in range(20_000)]


def base_text(size: int, separator: str) -> str:
    rng = random.Random(0)
    words = vocabulary(rng)
    parts: list[str] = []
    length = 0
    while length < size:
        sentence = " ".join(rng.choices(words, k=rng.randrange(4, 24))) + "." + separator
        parts.append(sentence)
        length += len(sentence)
    return "".join(parts)


def write_corpus(path: Path, size: int, kind: str) -> None:
    rng = random.Random(1)
    text = base_text(8_000_000, "\n" if kind == "lines" else " ")
    written = 0
    with path.open("w", encoding="ascii") as file:
        while written < size:
            start = rng.randrange(len(text) // 2)
            if kind == "documents":
                length = int(rng.lognormvariate(7.5, 1.2))
                piece = json.dumps({"text": f"{written}: {text[start : start + length]}"}) + "\n"
            else:
                piece = text[start : start + len(text) // 2]
            written += file.write(piece)


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in children.read_text().split() for p in tree(int(child))]
        except OSError:
            continue
    return found


def resident(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "textdiff").rglob("tokens-*.arrow"))


def prepare(source: Path, cache: Path, num_proc: int, kill_at: int | None = None) -> Run:
    """Runs the command; kills it when `kill_at` shards lie in the cache."""
    command = [
        *(sys.executable, "-m", "textdiff", "data", "prepare"),
        str(ROOT / "configs" / "text-files-bpe.yaml"),
        *(f"--data.sources.0.source={source}", f"--data.cache-dir={cache}"),
        *("--tokenizer", '{"kind": "byte"}', f"--data.num-proc={num_proc}"),
    ]
    found = len(shards(cache))
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(resident, tree(process.pid))))
        if kill_at is not None and len(shards(cache)) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        time.sleep(SAMPLED_EVERY_SECONDS)
    return Run(time.perf_counter() - start, peak, found, process.returncode)


def fingerprint(cache: Path) -> str:
    """Of the names and bytes of everything that a preparation leaves."""
    digest = hashlib.sha256()
    for path in sorted((cache / "textdiff").rglob("*")):
        digest.update(str(path.relative_to(cache)).encode())
        if path.is_file():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def measure(kind: str, size: int, num_proc: int, folder: Path) -> dict[str, object]:
    source = folder / ("text.jsonl" if kind == "documents" else "text.txt")
    write_corpus(source, size, kind)
    whole, broken = folder / "whole", folder / "broken"
    undisturbed = prepare(source, whole, num_proc)
    count = len(shards(whole))
    expected = fingerprint(whole)
    shutil.rmtree(whole)
    killed = prepare(source, broken, num_proc, kill_at=max(1, count // 2))
    resumed = prepare(source, broken, num_proc)
    return {
        "kind": kind,
        "bytes": source.stat().st_size,
        "shards": count,
        "undisturbed": asdict(undisturbed),
        "killed": asdict(killed),
        "resumed": asdict(resumed),
        "equal": fingerprint(broken) == expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--kinds", nargs="+", default=["documents", "lines", "line"])
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "evals/results/prepare.json")
    arguments = parser.parse_args()
    results = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(prefix="textdiff-prepare-") as folder:
            size = int(arguments.gigabytes * 1e9)
            results.append(measure(kind, size, arguments.num_proc, Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    record = {
        "command": f"python evals/prepare.py --gigabytes {arguments.gigabytes:g} "
        f"--kinds {' '.join(arguments.kinds)} --num-proc {arguments.num_proc}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_record(),
        "tokenizer": "byte",
        "results": results,
    }
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
