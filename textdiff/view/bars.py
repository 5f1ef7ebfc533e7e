"""Progress bars that an interruption clears away."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress

ECHO = 2
"""Columns of the ^C that a terminal writes where the cursor stands."""


class Bars(Progress):
    """Ends short of the edge of the terminal.

    Behind a line that reaches it the ^C would begin a new one, and what is cleared then would not
    be the line that was drawn.
    """

    def get_renderable(self) -> RenderableType:
        """The bars, with room behind them."""
        return _Shortened(super().get_renderable())


@dataclass(frozen=True)
class _Shortened:
    """Something in all columns but the last ones."""

    inside: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - ECHO)
        yield from console.render(self.inside, options.update_width(width))
