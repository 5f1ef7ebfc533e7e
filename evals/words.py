"""Share of the words that a model writes that occur in its training text.

    python evals/words.py runs/quickstart [--num-samples 32]

The share of words (runs of two or more letters, case folded) that occur in the training split of
the run's corpus, for samples from the run's export and, beside it, for the held-out text cut to the
same number of words. A second figure counts neighbouring pairs of words, which a word salad does
not share with its corpus.
"""

import argparse
import json
import re
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import transformers

from textdiff import TextDiffusion
from textdiff.config.reading import load
from textdiff.data.document_stream import iterate_texts
from textdiff.data.sources import load_documents
from textdiff.data.split import split_documents


def words(text: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[^\W\d_]{2,}", text)]


def share(found: list, known: set) -> float:
    return sum(item in known for item in found) / max(1, len(found))


def pairs(found: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    config = load(arguments.run / "config.yaml")
    (source,) = config.data.sources
    split = split_documents(load_documents(source), config.data.validation)
    training = words("\n".join(iterate_texts(split.train)))
    known, known_pairs = set(training), set(pairs(training))
    model = TextDiffusion.from_pretrained(arguments.run / "export")
    drawn = model.generate("", num_samples=arguments.num_samples, seed=arguments.seed)
    # The first and the last word of a sample may be cut by the edge of the canvas.
    sampled = [words(text)[1:-1] for text in drawn.texts]
    count = sum(map(len, sampled))
    held_out = words("\n".join(iterate_texts(split.validation)))[:count]
    record = {
        "run": arguments.run.name,
        "seed": arguments.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": arguments.num_samples,
        "words": count,
        "known_words": {
            "samples": share([w for sample in sampled for w in sample], known),
            "held_out_text": share(held_out, known),
        },
        "known_pairs": {
            "samples": share([p for sample in sampled for p in pairs(sample)], known_pairs),
            "held_out_text": share(pairs(held_out), known_pairs),
        },
        "distinct_words": len({w for sample in sampled for w in sample}),
        "texts": drawn.texts[:4],
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    for text in drawn.texts[:3]:
        print(text, end="\n\n---\n\n")
    for name in ("known_words", "known_pairs"):
        both = record[name]
        print(f"{name}: samples {both['samples']:.3f}, held-out text {both['held_out_text']:.3f}")


if __name__ == "__main__":
    main()
