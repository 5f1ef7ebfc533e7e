"""The findings about a corpus: its sources, lengths of documents, and their tokens."""

from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

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
