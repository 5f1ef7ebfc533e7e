"""Zero-shot perplexities: a model on the corpora that the literature reports.

    TEXTDIFF_DATA=... python evals/zero_shot.py runs/quickstart --datasets lambada wikitext2
    python evals/zero_shot.py runs/owt --protocol mdlm --output zero_shot.json

`evals/zero_shot.yaml` lists the corpora. One that lies below $TEXTDIFF_DATA is read from there, the
others from the Hugging Face hub. Without --protocol the number is a bound on the documents as they
are; with one, it is what the published tables hold, and every bias is written beside it. A corpus
that cannot be loaded or scored is reported with the reason, and the others go on.
"""

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers
import yaml

from textdiff import TextDiffusion
from textdiff.data.detokenize import detokenizer
from textdiff.data.text_files import read_texts
from textdiff.errors import DataError, TextDiffError
from textdiff.evaluate import evaluation_record
from textdiff.likelihood.protocols import PROTOCOLS

ROOT = Path(__file__).resolve().parent
CORPORA: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "zero_shot.yaml").read_text())


def local_path(corpus: dict[str, Any], split: str) -> Path | None:
    """The corpus's own copy on this machine, if there is one."""
    folder, name = os.environ.get("TEXTDIFF_DATA"), corpus.get("local", {}).get(split)
    if not folder or not name:
        return None
    path = Path(folder) / name
    return path if path.exists() else None


def rows(corpus: dict[str, Any], split: str, path: Path | None) -> list[str]:
    """The rows of a corpus as it is distributed."""
    if path is not None:
        texts = read_texts([str(path)], corpus["column"])
        return texts[0].splitlines(keepends=True) if corpus.get("lines") else texts
    import datasets

    try:
        found = datasets.load_dataset(
            corpus["hub"], corpus.get("config"), split=split, revision=corpus.get("revision")
        )
    except Exception as error:  # the transport's errors change with the installed HTTP client
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{corpus['hub']} cannot be loaded from the hub ({reason:.160})") from None
    return list(found[corpus["column"]])


def documents(corpus: dict[str, Any], split: str, path: Path | None, job: Any) -> list[str]:
    """What is scored: detokenised rows, joined where they are lines and no protocol joins them."""
    change = detokenizer(corpus["detokenizer"])
    texts = [change(text) for text in rows(corpus, split, path)[: job.max_documents]]
    return ["".join(texts)] if corpus.get("lines") and job.protocol == "none" else texts


def score(model: TextDiffusion, name: str, job: Any) -> dict[str, Any]:
    """The record of one corpus, or why there is none."""
    corpus = CORPORA[name]
    split = corpus["split"][job.protocol]
    path = local_path(corpus, split)
    protocol = None if job.protocol == "none" else job.protocol
    source = {"split": split, "source": corpus["hub"]}
    if path is not None:
        source = {"split": split, "source": corpus.get("local_note", "local copy")}
    options = {"protocol": protocol, "seed": job.seed, "replicates": job.replicates}
    options |= {"estimator": job.estimator} if job.estimator else {}
    try:
        texts = documents(corpus, split, path, job)
        estimates = model.estimate(texts, **options)
    except TextDiffError as error:
        return source | {"error": str(error)}
    return source | evaluation_record(
        model,
        estimates,
        options,
        detokenizer=corpus["detokenizer"],
        command=["python", "evals/zero_shot.py", *sys.argv[1:]],
    )


def _per_byte(result: dict[str, Any]) -> str:
    bits = result["bits_per_byte"]
    return "" if bits is None else f"{bits:.4f} bits/byte, "


def line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{name:12} {result['error']}"
    sign = "≤" if result["is_bound"] else "≈"
    error = result["perplexity"] * result["stderr"]
    return (
        f"{name:12} perplexity {sign} {result['perplexity']:.3f} ± {error:.3f}, "
        f"{_per_byte(result)}{result['tokens']:,} tokens "
        f"({result['split']}, {result['source']})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--datasets", nargs="+", choices=list(CORPORA), default=list(CORPORA))
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "none"], default="none")
    parser.add_argument("--estimator", help="default: the protocol's, else the model's")
    parser.add_argument("--replicates", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-documents", type=int, help="rows of each corpus, for a quick look")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    job = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = TextDiffusion.from_pretrained(job.model, dtype=job.dtype)
    except TextDiffError as error:
        sys.exit(f"zero_shot: {error}")
    results = {}
    for name in job.datasets:
        results[name] = score(model, name, job)
        print(line(name, results[name]), flush=True)
    if job.protocol != "none":
        print(f"protocol {job.protocol}; what is biased in these figures:")
        for bias in PROTOCOLS[job.protocol].biases(job.estimator or "time"):
            print(f"  - {bias}")
    record = {
        "what": "zero-shot perplexity",
        "model": job.model,
        "protocol": job.protocol,
        "max_documents": job.max_documents,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "results": results,
    }
    if job.output:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        job.output.write_text(json.dumps(record, indent=2) + "\n")
    return int(all("error" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
