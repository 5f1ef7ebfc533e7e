"""Published checkpoints as they are read, against what their official codes computed.

    TEXTDIFF_DATA=…/data python evals/golden.py

The folder `golden` beside the data has small random checkpoints of every family with the outputs
of the official codes. Prints and writes the largest differences of each family.
"""

import argparse
import json
import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from golden_case import Comparison, Golden
from golden_dit import MEASURES as DIT
from golden_stock import MEASURES as STOCK

from textdiff.export.records import code_record

ROOT = Path(__file__).resolve().parent
MEASURES = {**DIT, **STOCK}
COLUMNS = ("logits", "log-probabilities", "losses", "probabilities")


def measure(root: Path, name: str) -> list[Comparison]:
    """Return every comparison of one golden folder."""
    measured, file = MEASURES[name]
    return list(measured(Golden(root / name, file)))


def golden_folder() -> Path | None:
    """Return the folder of golden data; None: this machine has none."""
    data = os.environ.get("TEXTDIFF_DATA")
    folder = Path(data).parent / "golden" if data else None
    return folder if folder is not None and folder.is_dir() else None


def row(name: str, comparisons: list[Comparison]) -> dict[str, object]:
    """Return a line of the table: the largest differences, and the worst share of a tolerance."""
    line: dict[str, object] = {"family": name, "quantities": len(comparisons)}
    for kind in COLUMNS:
        of_kind = [c.difference for c in comparisons if c.kind == kind]
        line[kind] = max(of_kind, default=None)
    shares = [c.difference / c.tolerance if c.tolerance else c.difference for c in comparisons]
    line["share_of_tolerance"] = max(shares)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=list(MEASURES))
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "golden.json")
    job = parser.parse_args()
    folder = golden_folder()
    if folder is None:
        sys.exit("set TEXTDIFF_DATA to the data folder that has golden/ beside it")
    table, details = [], {}
    print(
        f"{'family':20} {'logits':>9} {'log-prob.':>9} {'losses':>9} {'prob.':>9}  worst/tolerance"
    )
    for name in job.families:
        comparisons = measure(folder, name)
        table.append(line := row(name, comparisons))
        details[name] = {
            c.name: {"difference": c.difference, "tolerance": c.tolerance} for c in comparisons
        }
        cells = " ".join("        –" if line[k] is None else f"{line[k]:9.1e}" for k in COLUMNS)
        print(f"{name:20} {cells}  {line['share_of_tolerance']:.2f}")
    record = {
        "what": "largest differences from the official codes, by family of published checkpoints",
        "command": shlex.join(["python", "evals/golden.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "dtype": "float32",
        "device": "cpu",
        "torch": torch.__version__,
        "code": code_record(),
        "table": table,
        "quantities": details,
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
