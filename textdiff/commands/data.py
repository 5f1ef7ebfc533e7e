"""`textdiff data prepare | inspect`: a corpus tokenised ahead of training, and looked at."""

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import load_config
from textdiff.view.inspection import show_corpus
from textdiff.view.progress import (
    PreparationView,
    make_console,
    print_json,
    quiet_libraries,
)

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.data.corpus import Corpus

_EXAMPLES = 3


def prepare_data(arguments: Sequence[str]) -> int:
    """Run `textdiff data prepare CONFIG [--section.key VALUE ...]`."""
    config, corpus = _prepared(arguments, "textdiff data prepare")
    train = corpus.record["train"]
    done = "already prepared, and its files are what was written" if corpus.cached else "prepared"
    print(f"{done}: {_amounts(corpus)}")
    print(
        f"{train['tokens']:,} training tokens, {train['sequences_per_epoch']:,} sequences of "
        f"{config.data.sequence_length} per epoch"
    )
    for stream in corpus.streams:
        size = sum(shard["bytes"] for shard in stream.shards)
        print(f"{stream.folder}  ({size / 1e6:,.1f} MB)")
    print(f"Train with it:\n  {shlex.join(['textdiff', 'train', *arguments])}")
    return 0


def inspect_data(arguments: Sequence[str]) -> int:
    """Run `textdiff data inspect CONFIG [--json] [--section.key VALUE ...]`."""
    words = [word for word in arguments if word != "--json"]
    config, corpus = _prepared(words, "textdiff data inspect", "[--json] ")
    findings = _findings(config, corpus)
    if len(words) < len(arguments):
        print_json(findings)
    else:
        show_corpus(make_console(), findings)
    return 0


def _prepared(arguments: Sequence[str], prog: str, extra: str = "") -> "tuple[Config, Corpus]":
    config = load_config(arguments, prog, extra)
    quiet_libraries()
    from textdiff.data.corpus import prepare_corpus

    with PreparationView() as progress:
        corpus = prepare_corpus(config.data, config.tokenizer, config.run.seed, progress=progress)
    for note in corpus.notes:
        print(note, file=sys.stderr)
    return config, corpus


def _amounts(corpus: "Corpus") -> str:
    sources = corpus.record["sources"]
    documents = sum(source["documents"] for source in sources)
    size = sum(source["bytes"] for source in sources)
    return f"{documents:,} documents, {size:,} bytes"


def _findings(config: "Config", corpus: "Corpus") -> dict[str, Any]:
    from textdiff.data.statistics import examples, length_histogram, source_statistics

    train = corpus.record["train"]
    samples = config.train.steps * config.train.global_batch_size
    sources = source_statistics(corpus)
    for source, omitted in zip(sources, corpus.omissions, strict=True):
        source |= {"left_out": dict(omitted.files), "bad_rows": omitted.bad_rows}
        length = source.get("sequences_per_epoch", train["sequences_per_epoch"])
        source["passes"] = samples * source.get("share", 1.0) / length
    return {
        "sources": sources,
        "train": train,
        "validation": corpus.record["validation"],
        "tokenizer": corpus.record["tokenizer"],
        "sequence_length": config.data.sequence_length,
        "steps": config.train.steps,
        "global_batch_size": config.train.global_batch_size,
        "document_tokens": length_histogram(corpus),
        "examples": examples(corpus, _EXAMPLES),
        "cache": [str(stream.folder) for stream in corpus.streams],
    }
