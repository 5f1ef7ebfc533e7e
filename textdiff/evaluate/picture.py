"""The picture of a sweep: the frontier on the left, what tokens per call cost on the right."""

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


def require() -> Any:
    """matplotlib's figure class, which needs no screen.

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
    """Draws what the suite `frontier` found.

    Args:
        record: its result.
        path: the PNG file to write.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_class = require()
    from matplotlib.ticker import LogLocator

    figure = figure_class(figsize=(10.5, 5.4), layout="constrained")
    plane, cost = figure.subplots(1, 2)
    points = record["points"]
    baseline = [point for point in points if point["baseline"]]
    _draw_baseline(plane, baseline)
    _draw_real(plane, record["reference"]["figures"])
    for mine, style in _series([point for point in points if not point["baseline"]]):
        _draw_plane(plane, mine, style)
        _draw_cost(cost, mine, style)
    plane.set_yscale("log")
    plane.set_xlabel("unigram entropy of a text, nats")
    plane.set_ylabel("generative perplexity per judge token")
    plane.set_title("below the line is better", fontsize=10)
    plane.yaxis.set_major_formatter("{x:.3g}")
    plane.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    plane.yaxis.set_minor_formatter("{x:.3g}")
    cost.axhline(0.0, color=_BASELINE, linewidth=1)
    cost.set_xscale("log", base=2)
    cost.xaxis.set_major_formatter("{x:g}")
    cost.set_xlabel("tokens per network call of a row")
    cost.set_ylabel("excess over the baseline at equal entropy,\nnats per judge token")
    cost.set_title("0: as good as the baseline, below is better", fontsize=10)
    for axes in (plane, cost):
        axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(
        *plane.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    figure.suptitle(_title(record), fontsize=10)
    figure.savefig(path, dpi=110)


def _series(points: Sequence[Point]) -> list[tuple[list[Point], dict[str, Any]]]:
    """Points of one rule and its knobs, whatever their steps and temperature, and their style."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for point in points:
        asked = point["sampling"]
        name = point["curve"].removesuffix(f", {asked['steps']} steps")
        groups.setdefault(asked["rule"], {}).setdefault(name, []).append(point)
    found = []
    for number, settings in enumerate(groups.values()):
        for variant, (name, mine) in enumerate(settings.items()):
            style = {
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[number % len(_MARKERS)],
                "fillstyle": _FILLS[variant % len(_FILLS)],
                "linestyle": "none",
                "markersize": 6,
                "elinewidth": 0.8,
                "label": name,
            }
            found.append((mine, style))
    return found


def _title(record: Mapping[str, Any]) -> str:
    count, judge = record["sampling"]["num_samples"], record["judge"]["name"].rstrip("/")
    return (
        f"{count} texts of {record['length']} tokens per point, judge {judge.rsplit('/', 1)[-1]}, "
        "bars: 95 % intervals over texts"
    )


def _bars(figures: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their bars reach down and up."""
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
