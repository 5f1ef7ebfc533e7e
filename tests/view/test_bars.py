"""Progress bars leave room for the ^C that a terminal writes behind them."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from textdiff.view.progress import BatchBar, PreparationView, ProgressBar
from textdiff.view.training import LiveView


def training() -> LiveView:
    view = LiveView(Console(file=io.StringIO(), force_terminal=True))
    view.progress.update(view.training, total=1000, completed=400, figures="loss 1.234  5 tok/s")
    return view


def batch() -> BatchBar:
    bar = BatchBar("generating", 51, shown=True)
    bar.bar.update(bar.task, speed="421 tokens/s")
    return bar


def preparation() -> PreparationView:
    view = PreparationView()
    view.bar.add_task("tokenising", total=None, amount="1,234.5 of 2,345.6 M")
    return view


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize(
    "bars",
    [
        lambda: training().progress,
        lambda: batch().bar,
        lambda: preparation().bar,
        lambda: ProgressBar("estimating").bar,
    ],
    ids=["training", "batch", "preparation", "plain"],
)
def test_an_interruption_writes_into_the_line_that_is_cleared(monkeypatch, bars, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = bars()
    lines = shown.console.render_lines(shown.get_renderable(), pad=False)
    texts = ["".join(segment.text for segment in line) for line in lines]
    assert any(text.strip() for text in texts)
    assert max(cell_len(text + "^C") for text in texts) <= width
