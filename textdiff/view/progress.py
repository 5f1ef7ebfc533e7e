"""Progress on a terminal: bars that an interruption clears, and quiet libraries."""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_SECONDS_BETWEEN_LINES = 30.0


def make_console() -> Any:
    """Return a rich console on standard output."""
    return Console()


def print_json(record: Any, indent: int = 2) -> None:
    """Print an object as JSON in ASCII, which no terminal, pipe or shell changes."""
    print(json.dumps(record, indent=indent))


class _StderrBar:
    """Bar on standard error while entered; where that is not a terminal, lines if anything.

    Args:
        *columns: of the bar; rich's own where there are none.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, *columns: ProgressColumn, shown: bool = True):
        console = Console(stderr=True)
        self.plain = shown and not console.is_terminal
        silent = not shown or self.plain
        self.bar = unfailing(Bars(*columns, console=console, disable=silent, transient=True))
        self.printed = time.monotonic()

    def __enter__(self) -> Callable[..., None]:
        self.bar.start()
        return self._show

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def _show(self, *figures: Any) -> None:
        raise NotImplementedError

    def _waited(self) -> bool:
        return time.monotonic() - self.printed > _SECONDS_BETWEEN_LINES

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        self.printed = time.monotonic()


class ProgressBar(_StderrBar):
    """Bar of (done, total) and a title; silent where standard error is not a terminal.

    Args:
        title: what progresses.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, title: str, shown: bool = True):
        super().__init__(shown=shown)
        self.task = self.bar.add_task(title, total=None)

    def _show(self, done: int, total: int, title: str | None = None) -> None:
        self.bar.update(self.task, completed=done, total=total, description=title)


class BatchBar(_StderrBar):
    """Rows and tokens per second of a job, from (rows done, new tokens).

    A terminal gets a bar; anything else a line every half minute.

    Args:
        title: what is done.
        rows: rows of the job.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, title: str, rows: int, shown: bool):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows  {task.fields[speed]}"),
            TimeRemainingColumn(),
            shown=shown,
        )
        self.title, self.rows, self.tokens = title, rows, 0
        self.task = self.bar.add_task(title, total=rows, speed="")
        self.began = time.monotonic()

    def _show(self, done: int, tokens: int) -> None:
        self.tokens += tokens
        seconds = max(1e-3, time.monotonic() - self.began)
        speed = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else ""
        self.bar.update(self.task, completed=done, speed=speed)
        if self.plain and self._waited():
            self._print(f"{self.title}: {done} of {self.rows} rows, {speed}".removesuffix(", "))


class PreparationView(_StderrBar):
    """Stages of a corpus's preparation, from (stage, done, total).

    A terminal gets a bar for each stage. Anything else gets a line when a stage begins, one every
    half minute, and one when it is done.

    Args:
        shown: False for processes that have nothing to say.
    """

    def __init__(self, shown: bool = True):
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            shown=shown,
        )
        self.stage = self.amount = ""

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if error[0] is None:
            self._finish()

    def _show(self, stage: str, done: int, total: int | None) -> None:
        fresh = stage != self.stage
        if fresh:
            self._finish()
            self.task = self.bar.add_task(stage, total=total, amount="")
        self.stage = stage
        self.amount = f"{done / 1e6:,.1f}" + (f" of {total / 1e6:,.1f} M" if total else " M")
        self.bar.update(self.task, completed=done, total=total, amount=self.amount)
        if self.plain and (fresh or self._waited()):
            self._print(f"{stage}: {self.amount}")

    def _finish(self) -> None:
        if not self.stage:
            return
        if self.plain:
            self._print(f"{self.stage}: {self.amount}, done")
        self.bar.update(self.task, total=1, completed=1)
        self.bar.stop_task(self.task)


def quiet_libraries() -> None:
    """Turn the libraries' own bars and warnings off."""
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
    """Bars that end short of the edge of the terminal.

    After a line that reaches it the ^C would begin a new line. Then another line than the one that
    was drawn would be cleared.
    """

    def get_renderable(self) -> RenderableType:
        """Return the bars, with room behind them."""
        return _Shortened(super().get_renderable())


@dataclass(frozen=True)
class _Shortened:
    """Renderable in all columns but the last ones."""

    inside: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width - ECHO)
        yield from console.render(self.inside, options.update_width(width))


T = TypeVar("T")


def unfailing(view: T) -> T:
    """Return the same view, whose methods raise no errors: after the first one they do nothing.

    Args:
        view: a progress bar, a reporter, a watcher: something whose results no caller needs.
    """
    return cast(T, _Unfailing(view))


class _Unfailing:
    def __init__(self, view: Any):
        self._view = view
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._view, name)
        return self._guarded(attribute) if callable(attribute) else attribute

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
