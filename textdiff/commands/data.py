"""`textdiff data prepare`, `data inspect`, `config show`: a run's data and config beforehand."""

import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from textdiff.commands.arguments import load_config
from textdiff.view.progress import (
    PreparationView,
    make_console,
    print_json,
    quiet_libraries,
)

if TYPE_CHECKING:
    from textdiff.config import Config
    from textdiff.data.corpus import Corpus
    from textdiff.data.packing import Verify


_EXAMPLES = 3


def prepare_data(arguments: Sequence[str]) -> int:
    """Run `textdiff data prepare CONFIG [--section.key VALUE ...]`."""
    config, corpus = _prepared(arguments, "textdiff data prepare", verify="all")
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


def _prepared(
    arguments: Sequence[str], prog: str, extra: str = "", verify: "Verify" = "changed"
) -> "tuple[Config, Corpus]":
    config = load_config(arguments, prog, extra)
    quiet_libraries()
    from textdiff.data.corpus import prepare_corpus

    with PreparationView() as progress:
        corpus = prepare_corpus(
            config.data,
            config.tokenizer,
            config.run.seed,
            block_sizes=config.diffusion.block_sizes,
            verify=verify,
            progress=progress,
        )
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


def show_config(arguments: Sequence[str]) -> int:
    """Run `textdiff config show FILE [--section.key VALUE ...]`."""
    from textdiff.config.reading import to_yaml

    print(to_yaml(load_config(arguments, "textdiff config show")), end="")
    return 0


_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def show_corpus(console: Console, findings: dict[str, Any]) -> None:
    """Show what `textdiff data inspect` has counted, as tables and bars."""

    def line(text: str = "") -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    console.print(_sources(findings))
    train, validation, tokenizer = (findings[k] for k in ("train", "validation", "tokenizer"))
    line()
    line(
        f"{train['tokens']:,} training tokens in {train['documents']:,} documents; "
        f"{train['sequences_per_epoch']:,} sequences of {findings['sequence_length']} per epoch."
    )
    line(
        f"{validation['documents']:,} documents of {validation['characters']:,} characters are "
        "held out."
    )
    line(f"The {tokenizer['kind']} tokenizer has {tokenizer['vocabulary']:,} ids.")
    line(
        f"Tokens are of the training text; passes are those of {findings['steps']:,} steps of "
        f"{findings['global_batch_size']} sequences."
    )
    line()
    lengths = findings["document_tokens"]
    line(
        f"Training documents by length in tokens (median {lengths['median']:,.0f}, longest "
        f"{lengths['longest']:,}):"
    )
    _show_histogram(console, lengths["edges"], lengths["counts"])
    line()
    line("How documents begin, cut into tokens:")
    for texts in findings["examples"]:
        _show_tokens(console, texts)


def _sources(findings: dict[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("source", overflow="fold")
    for name in ("documents", "bytes", "tokens", "bytes/token", "share", "passes"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(source["train_tokens"] for source in findings["sources"])
    for source in findings["sources"]:
        ratio = source["bytes_per_token"]
        table.add_row(
            source["source"],
            f"{source['documents']:,}",
            f"{source['bytes']:,}",
            f"{source['train_tokens']:,}",
            "-" if ratio is None else f"{ratio:.3f}",
            f"{source.get('share', source['train_tokens'] / whole):.1%}",
            f"{source['passes']:.2f}",
        )
    return table


def _show_histogram(console: Console, edges: list[int], counts: list[int]) -> None:
    labels = [f"{low:,} - {high - 1:,}" for low, high in pairwise(edges)]
    wide = max(map(len, labels))
    digits = len(f"{max(counts):,}")
    room = max(8, console.width - wide - digits - 8)
    for label, count in zip(labels, counts, strict=True):
        eighths = -(-count * room * 8 // max(counts))
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        text = f"  {label:>{wide}}  {count:>{digits},}  {bar}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _show_tokens(console: Console, texts: list[str]) -> None:
    shown = Text("  ")
    for number, text in enumerate(texts):
        if number:
            shown.append("│", style="dim")
        # Visible spaces: the terminal would drop those at which it wraps.
        shown.append(text.translate(_VISIBLE), style="bold cyan" if number % 2 else "")
    console.print(shown, soft_wrap=not console.is_terminal)
