"""The picture of a sweep: the frontier on the left, the cost of tokens per call on the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError

# Okabe and Ito's palette, which colour-blind people can tell apart; markers differ as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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


def draw(record: Mapping[str, Any], path: Path) -> None:
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
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[number % len(_MARKERS)],
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
    x, x_bars = _bars([figures["entropy"]])
    y, y_bars = _bars([figures["gen_ppl"]])
    style = {"color": "#666666", "marker": "*", "markersize": 14, "linestyle": "none"}
    axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, label="real text", zorder=5, **style)


def _draw_plane(axes: Any, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    x, x_bars = _bars([p["figures"]["entropy"] for p in points])
    y, y_bars = _bars([p["figures"]["gen_ppl"] for p in points])
    axes.errorbar(x, y, xerr=x_bars, yerr=y_bars, **style)


def _draw_cost(axes: Any, points: Sequence[Point], style: Mapping[str, Any]) -> None:
    reached = [p for p in points if p["excess"] and p["excess"]["value"] is not None]
    if reached:
        y, bars = _bars([p["excess"] for p in reached])
        axes.errorbar([p["tokens_per_call"] for p in reached], y, yerr=bars, **style)
