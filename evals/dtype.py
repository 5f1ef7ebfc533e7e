"""Bound of a bfloat16 network against that of the float32 one, under the same noise.

    python evals/dtype.py runs/shakespeare-char runs/shakespeare-char/validation.jsonl \\
        --characters 30000

Weights and activations are bfloat16; logits are normalised in float32 in both.
"""

import argparse
import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

from textdiff import TextDiffusion
from textdiff.data.text_files import read_texts
from textdiff.export.records import code_record, model_record
from textdiff.likelihood.difference import compare

ROOT = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--characters", type=int, help="of each document, the first ones")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "dtype.json")
    job = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    texts = [text[: job.characters] for text in read_texts([job.text])]
    found, folder = {}, None
    for dtype in ("float32", "bfloat16"):
        model = TextDiffusion.from_pretrained(job.model, dtype=dtype)
        found[dtype], folder = model.estimate(texts, replicates=job.replicates), model.folder
    wide, narrow = (found[dtype].bound() for dtype in ("float32", "bfloat16"))
    difference = compare(found["bfloat16"], found["float32"])
    record = {
        "what": "bound of one model in bfloat16 minus float32, common random numbers",
        "command": shlex.join(["python", "evals/dtype.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        **model_record(folder),
        "code": code_record(),
        "tokens": wide.tokens,
        "replicates": wide.replicates,
        "nats_per_token": {"float32": wide.mean, "bfloat16": narrow.mean},
        "difference_nats": difference.mean,
        "difference_stderr": difference.stderr,
        "relative": difference.mean / wide.mean,
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    job.output.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"float32 {wide.mean:.6f}, bfloat16 {narrow.mean:.6f} nats/token: "
        f"{100 * record['relative']:+.4f} % ± {100 * difference.stderr / wide.mean:.4f} %"
    )


if __name__ == "__main__":
    main()
