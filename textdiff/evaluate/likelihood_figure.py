"""Result of the suite `likelihood-frontier`: lines of plain text, and its picture."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from textdiff.evaluate.presentation import COLOURS, MARKERS, require_matplotlib


def likelihood_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the lines that a terminal shows.

    Args:
        record: the suite's result.
    """
    head = f"{'':42}{'tokens/call':>12}{'nats/token':>18}{'over the bound':>20}"
    bound = record["bound"]
    whole = _with_error(bound["mean"], bound["text_stderr"])
    lines = [head, f"{'bound (' + bound['estimator'] + ')':42}{'':12}{whole:>18}"]
    for point in record["points"]:
        nats, over = _with_error(point["nats"], point["text_stderr"]), "-"
        if point["over_bound"]:
            over = _with_error(point["over_bound"]["nats"], point["over_bound"]["text_stderr"])
        lines.append(f"{point['curve']:42}{point['tokens_per_call']:>12.3f}{nats:>18}{over:>20}")
    return [*lines, "", *_notes(record)]


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _notes(record: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{record['documents']} documents; after ± standard errors over them, of the last column "
        "for pairs: a rule's exact likelihood less the bound of the same document"
    )
    if common := record["common"]:
        yield "of tokens drawn with " + ", ".join(f"{k} {v}" for k, v in common.items())
    never = [point["curve"] for point in record["points"] if point["impossible"]]
    if never:
        yield f"some documents have probability 0 under: {'; '.join(never)}"
    for rule, reason in record["left_out"].items():
        yield f"left out: {rule} {reason}"


def draw_likelihood_frontier(record: Mapping[str, Any], path: Path) -> None:
    """Draw the suite's result.

    Args:
        record: its result.
        path: the PNG file to write.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = require_matplotlib()(figsize=(10.5, 5.0), layout="constrained")
    absolute, relative = figure.subplots(1, 2)
    bound = record["bound"]
    absolute.axhline(bound["mean"], color="#000000", linewidth=1, label="bound over random orders")
    relative.axhline(0.0, color="#000000", linewidth=1)
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for point in record["points"]:
        if point["over_bound"]:
            lines.setdefault(point["line"], []).append(point)
    for (name, points), colour, marker in zip(
        lines.items(), cycle(COLOURS), cycle(MARKERS), strict=False
    ):
        points = sorted(points, key=lambda point: float(point["tokens_per_call"]))
        x = [point["tokens_per_call"] for point in points]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1}
        absolute.plot(x, [point["nats"] for point in points], label=name, **style)
        over = [point["over_bound"] for point in points]
        bars = [1.96 * o["text_stderr"] for o in over]
        relative.errorbar(x, [o["nats"] for o in over], yerr=bars, elinewidth=0.8, **style)
    absolute.set_ylabel("nats per token of held-out text")
    relative.set_ylabel("nats per token less the bound,\nbars: 95 % over documents")
    for axes in (absolute, relative):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens per network call of a row")
        axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(*absolute.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"{record['documents']} documents: exact likelihood, below is better")
    figure.savefig(path, dpi=110)
