"""The screen: one console, one progress bar, and libraries that keep quiet."""

import os
from collections.abc import Callable
from typing import Any


def make_console() -> Any:
    """A rich console on standard output."""
    from rich.console import Console

    return Console()


class ProgressBar:
    """A progress bar on standard error while entered; silent where that is no terminal.

    Args:
        title: what progresses.
        shown: False for processes that have nothing to say.
    """

    def __init__(self, title: str, shown: bool = True):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        silent = not (shown and console.is_terminal)
        self.bar = Progress(console=console, disable=silent, transient=True)
        self.task = self.bar.add_task(title, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def quiet_libraries() -> None:
    """One voice on the screen: the libraries' own bars and warnings are off."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
