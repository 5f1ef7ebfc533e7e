"""Results of suites in lines of plain text that fit 80 columns."""

from collections.abc import Iterator, Mapping
from math import floor, log10
from typing import Any

from textdiff.evaluate.bootstrap import UNDEFINED, Figure
from textdiff.evaluate.text_metrics import METRICS

_LEFT, _RIGHT = 31, 24


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the suite `generation`.

    Args:
        record: its result.
    """
    sides = [record["samples"], *([record["reference"]] if "reference" in record else [])]
    lines = [
        f"{'':{_LEFT}}" + "".join(f"{x:>{_RIGHT}}" for x in ("samples", "real text")[: len(sides)])
    ]
    for name, metric in METRICS.items():
        figures = [Figure.from_dict(side["figures"][name]) for side in sides]
        if any(figure.defined for figure in figures):
            lines.append(_line(metric.title, metric.unit, figures))
    if record["mauve"]:
        pair = [record["mauve"][side] for side in ("samples", "reference")]
        lines.append(_line("MAUVE", "", [Figure.from_dict(f) if f else UNDEFINED for f in pair]))
    return [*lines, "", *_notes(record)]


def shown(figure: Figure) -> str:
    """Return a figure with its interval, to the digits that this leaves; `-`: not defined."""
    if not figure.defined:
        return "-"
    parts = (figure.value, figure.low, figure.high)
    if figure.high >= 1e5:
        return "{:.2e} ({:.1e}-{:.1e})".format(*parts)
    width = figure.high - figure.low
    digits = 1 - floor(log10(width)) if width > 0 else 3  # two of the interval's width
    most = 1 if figure.high >= 100 else 4  # that a column holds it
    return "{:.{d}f} ({:.{d}f}-{:.{d}f})".format(*parts, d=min(most, max(0, digits)))


def _line(title: str, unit: str, figures: list[Figure]) -> str:
    name = f"{title}, {unit}" if unit else title
    return f"{name:<{_LEFT}}" + "".join(f"{shown(figure):>{_RIGHT}}" for figure in figures)


def _notes(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on the texts of the table, and on its limits."""
    texts = record["samples"]
    yield (
        f"{texts['texts']} texts of at most {record['length']} tokens; in brackets 95 % intervals "
        "over texts"
    )
    sampling = record["sampling"]
    if sampling:
        knobs = "".join(f", {name} {value}" for name, value in sampling["knobs"].items())
        yield (
            f"rule {sampling['rule']}{knobs}, {sampling['steps']} steps, temperature "
            f"{sampling['temperature']}, seed {sampling['seed']}: "
            f"{record['tokens_per_call']:.2f} tokens per network call"
        )
    if texts["empty"]:
        yield f"{texts['empty']} of the texts are empty"
    judge = record["judge"]
    if judge is None:
        yield "no judge: with --judge MODEL there is a generative perplexity beside the entropy"
        return
    yield f"judge {judge['name']} ({judge['kind']}), first token {judge['first_token']}"
    if texts["longer_than_judge"]:
        yield (
            f"{texts['longer_than_judge']} texts are longer than the judge's context of "
            f"{judge['context']}: read in windows whose second half is new"
        )
    if texts["lossy_for_judge"]:
        yield (
            f"the judge's tokens do not give {texts['lossy_for_judge']} of the texts back: it "
            "judges what they give back, and bits per byte are not defined"
        )
    yield (
        "a low perplexity with an entropy below that of real text is repetition or caution, "
        "not quality"
    )


def frontier_lines(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the suite `frontier`.

    Args:
        record: its result.
    """
    head = f"{'':38}{'T':>9}{'tokens/call':>13}{'gen. ppl':>10}{'entropy':>9}{'excess':>20}"
    real = record["reference"]["figures"]
    lines = [head, f"{'real text':38}{'':22}{_plain(real['gen_ppl'])}{_plain(real['entropy'], 9)}"]
    for point in record["points"]:
        figures, temperature = point["figures"], point["sampling"]["temperature"]
        excess = "baseline" if point["baseline"] else shown(Figure.from_dict(point["excess"]))
        lines.append(
            f"{point['curve']:38}{temperature!s:>9}{point['tokens_per_call']:>13.2f}"
            f"{_plain(figures['gen_ppl'])}{_plain(figures['entropy'], 9)}{excess:>20}"
        )
    return [*lines, "", *_frontier_notes(record)]


MARGIN = 0.05
"""Excess in nats per judge token that counts as none, if the interval's upper end is within it."""


def free_of_cost(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the point of most tokens per call that is shown to be as good as the baseline.

    Args:
        record: result of the suite `frontier`.

    Returns:
        None where no point's interval ends within `MARGIN` of the baseline: that may be the points,
        or too few texts.
    """
    free = [
        point
        for point in record["points"]
        if point["excess"] is not None
        and point["excess"]["high"] is not None
        and point["excess"]["high"] <= MARGIN
    ]
    return max(free, key=lambda point: point["tokens_per_call"], default=None)


def _plain(figure: Mapping[str, float | None], width: int = 10) -> str:
    value = figure["value"]
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"


def _frontier_notes(record: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "excess: log perplexity above the baseline's at the same entropy, nats per judge token, "
        "with its 95 % interval; -: the baseline's curve does not reach there"
    )
    lengths = [p["figures"]["tokens"]["value"] for p in [record["reference"], *record["points"]]]
    if max(lengths) > 1.1 * min(lengths):
        yield (
            f"texts have {min(lengths):.0f} to {max(lengths):.0f} tokens on average, and short "
            "ones less entropy for that alone: --min-new-tokens makes them alike"
        )
    best = free_of_cost(record)
    if best is None:
        yield (
            f"no setting is shown to be within {MARGIN} nats of the baseline at equal entropy; "
            "where intervals are wide, more texts narrow them"
        )
    else:
        yield (
            f"most tokens per call shown to be within {MARGIN} nats of the baseline: "
            f"{best['curve']} at temperature {best['sampling']['temperature']}, "
            f"{best['tokens_per_call']:.2f}"
        )
    for rule, reason in record["left_out"].items():
        yield f"left out: {rule} {reason}"
