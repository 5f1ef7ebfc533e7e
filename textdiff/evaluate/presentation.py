"""Results of suites: lines of plain text that fit 80 columns, and the picture of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError
from textdiff.evaluate.figures import UNDEFINED, Figure
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


# Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FILLS = ("full", "none", "left", "right", "top", "bottom")  # settings of one rule
_BASELINE = "#000000"

Point = Mapping[str, Any]


def require_matplotlib() -> Any:
    """Return matplotlib's figure class, which needs no screen.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            'the picture needs matplotlib; pip install "textdiff[eval]", or leave --picture out'
        ) from None
    return Figure


def draw_frontier(record: Mapping[str, Any], path: Path) -> None:
    """Draw the result of the suite `frontier`.

    Args:
        record: its result.
        path: the PNG file to write.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_class = require_matplotlib()
    from matplotlib.ticker import LogLocator

    figure = figure_class(figsize=(10.5, 5.4), layout="constrained")
    plane, cost = figure.subplots(1, 2)
    points = record["points"]
    baseline = [point for point in points if point["baseline"]]
    _draw_baseline(plane, baseline)
    _draw_real(plane, record["reference"]["figures"])
    for series, style in _series([point for point in points if not point["baseline"]]):
        _draw_plane(plane, series, style)
        _draw_cost(cost, series, style)
    plane.set_yscale("log")
    plane.set_xlabel("unigram entropy of a text, nats")
    plane.set_ylabel("generative perplexity per judge token")
    plane.set_title("below the line is better", fontsize=10)
    plane.yaxis.set_major_formatter("{x:.3g}")
    plane.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    plane.yaxis.set_minor_formatter("{x:.3g}")
    _label_cost(cost)
    for axes in (plane, cost):
        axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(
        *plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.suptitle(_title(record), fontsize=10)
    figure.savefig(path, dpi=110)


def _label_cost(axes: Any) -> None:
    axes.axhline(0.0, color=_BASELINE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens per network call of a row")
    axes.set_ylabel("excess over the baseline at equal entropy,\nnats per judge token")
    axes.set_title("0: as good as the baseline, below is better", fontsize=10)


def _series(points: Sequence[Point]) -> list[tuple[list[Point], dict[str, Any]]]:
    """Return points of one rule and its knobs, all steps and temperatures, with their style."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        asked = point["sampling"]
        name = point["curve"].removesuffix(f", {asked['steps']} steps")
        groups.setdefault(asked["rule"], {}).setdefault(name, []).append(point)
    styled = []
    for number, settings in enumerate(groups.values()):
        for variant, (name, series) in enumerate(settings.items()):
            style = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "fillstyle": _FILLS[variant % len(_FILLS)],
                "linestyle": "none",
                "markersize": 6,
                "elinewidth": 0.8,
                "label": name,
            }
            styled.append((series, style))
    return styled


def _title(record: Mapping[str, Any]) -> str:
    count, judge = record["sampling"]["num_samples"], record["judge"]["name"].rstrip("/")
    return (
        f"{count} texts of {record['length']} tokens per point, judge {judge.rsplit('/', 1)[-1]}, "
        "bars: 95 % intervals over texts"
    )


def _bars(figures: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return values, and how far their bars reach down and up."""
    values = [f["value"] for f in figures]
    down = [max(0.0, f["value"] - f["low"]) for f in figures]
    up = [max(0.0, f["high"] - f["value"]) for f in figures]
    return values, [down, up]


def _draw_baseline(axes: Any, points: Sequence[Point]) -> None:
    ordered = sorted(points, key=lambda p: p["figures"]["entropy"]["value"])
    style = {"color": _BASELINE, "marker": ".", "linewidth": 1.2, "elinewidth": 0.8}
    if ordered:
        label = f"baseline: {ordered[0]['curve']}, by temperature"
        _draw_plane(axes, ordered, style | {"label": label})


def _draw_real(axes: Any, figures: Mapping[str, Mapping[str, float]]) -> None:
    style = {"color": "#666666", "marker": "*", "markersize": 14, "linestyle": "none", "zorder": 5}
    _draw_plane(axes, [{"figures": figures}], style | {"label": "real text"})


def _draw_plane(axes: Any, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    x, x_bars = _bars([p["figures"]["entropy"] for p in points])
    y, y_bars = _bars([p["figures"]["gen_ppl"] for p in points])
    axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, **style)


def _draw_cost(axes: Any, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    reached = [p for p in points if p["excess"] and p["excess"]["value"] is not None]
    if reached:
        y, bars = _bars([p["excess"] for p in reached])
        axes.errorbar([p["tokens_per_call"] for p in reached], y, yerr=bars, **style)
