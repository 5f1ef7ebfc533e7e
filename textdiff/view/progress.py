"""The screen: one console, one progress bar, and libraries that keep quiet."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import Progress

_SECONDS_BETWEEN_LINES = 30.0


def make_console() -> Any:
    """A rich console on standard output."""
    from rich.console import Console

    return Console()


def print_json(record: Any, indent: int = 2) -> None:
    """Prints an object as JSON in ASCII, which no terminal, pipe or shell changes."""
    print(json.dumps(record, indent=indent))


class ProgressBar:
    """A progress bar on standard error while entered; silent where that is no terminal.

    Args:
        title: what progresses.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, title: str, shown: bool = True):
        from rich.console import Console

        console = Console(stderr=True)
        silent = not (shown and console.is_terminal)
        self.bar = unfailing(Bars(console=console, disable=silent, transient=True))
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def rename(self, title: str) -> None:
        """Something else progresses now."""
        self.bar.update(self.task, description=title)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


class BatchBar:
    """Rows and tokens per second of a job, on standard error while entered.

    A terminal gets a bar; anything else a line every half minute.

    Args:
        title: what is done.
        rows: rows of the whole job.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, title: str, rows: int, shown: bool):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.title, self.rows = title, rows
        self.plain = shown and not console.is_terminal
        bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows  {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self.plain,
            transient=True,
        )
        self.bar = unfailing(bar)
        self.tokens = 0

    def __enter__(self) -> Callable[[int, int], None]:
        self.began = self.said = time.monotonic()
        self.task = self.bar.add_task(self.title, total=self.rows, speed="")
        self.bar.start()
        return self._tell

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def _tell(self, done: int, tokens: int) -> None:
        """So many rows are done; the last one brought so many tokens."""
        self.tokens += tokens
        now = time.monotonic()
        speed = f"{self.tokens / max(1e-3, now - self.began):,.0f} tokens/s" if self.tokens else ""
        self.bar.update(self.task, completed=done, speed=speed)
        if self.plain and now - self.said > _SECONDS_BETWEEN_LINES:
            line = f"{self.title}: {done} of {self.rows} rows, {speed}"
            print(line.removesuffix(", "), file=sys.stderr, flush=True)
            self.said = now


class PreparationView:
    """What the preparation of a corpus is doing, on standard error while entered.

    A terminal gets a bar for each stage; anything else a line when a stage begins, one every half
    minute, and one when it is done.

    Args:
        shown: False for processes that have nothing to say.
    """

    def __init__(self, shown: bool = True):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.plain = shown and not console.is_terminal
        bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self.plain,
            transient=True,
        )
        self.bar = unfailing(bar)
        self.stage = ""
        self.amount = ""
        self.said = 0.0

    def __enter__(self) -> Callable[[str, int, int | None], None]:
        self.bar.start()
        return self._tell

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if error[0] is None:
            self._finish()

    def _tell(self, stage: str, done: int, total: int | None) -> None:
        fresh = stage != self.stage
        if fresh:
            self._finish()
            self.task = self.bar.add_task(stage, total=total, amount="")
        self.stage = stage
        self.amount = f"{done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} M" if total else " M")
        self.bar.update(self.task, completed=done, total=total, amount=self.amount)
        if self.plain and (fresh or time.monotonic() - self.said > _SECONDS_BETWEEN_LINES):
            self._say(f"{stage}: {self.amount}")

    def _finish(self) -> None:
        if not self.stage:
            return
        if self.plain:
            self._say(f"{self.stage}: {self.amount}, done")
        self.bar.update(self.task, total=1, completed=1)
        self.bar.stop_task(self.task)

    def _say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self.said = time.monotonic()


def quiet_libraries() -> None:
    """One voice on the screen: the libraries' own bars and warnings are off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # `datasets` reads these where a corpus needs it; for a text and a model it is not imported.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if datasets := sys.modules.get("datasets"):
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()


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


T = TypeVar("T")


def unfailing(view: T) -> T:
    """The same view, whose methods raise no errors: after the first one they do nothing.

    Args:
        view: a progress bar, a reporter, a watcher: something whose results nobody needs.
    """
    return cast(T, _Unfailing(view))


class _Unfailing:
    def __init__(self, view: Any):
        self._view = view
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._view, name)
        return self._guarded(found) if callable(found) else found

    def __enter__(self) -> "_Unfailing":
        self._guarded(self._view.__enter__)()
        return self

    def __exit__(self, *error: object) -> None:
        self._failed = False  # also a broken display gives the terminal back, if it can
        self._guarded(self._view.__exit__)(*error)

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*values: Any, **named: Any) -> Any:
            if self._failed:
                return None
            try:
                return method(*values, **named)
            except Exception as error:
                self._failed = True
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"note: the display failed and is off ({reason})", file=sys.stderr)
                return None

        return call
