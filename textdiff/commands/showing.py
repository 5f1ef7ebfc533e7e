"""What verbs that generate text show of it and record: their flags."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from textdiff.commands.arguments import writable


@dataclass(frozen=True)
class Showing:
    """What is shown and recorded of a generation."""

    watch: bool = False
    """Show the text in the terminal while it is denoised."""

    film: Path | None = None
    """Write the generation as a film to this HTML file, which plays in any browser, offline."""

    trace: Path | None = None
    """Write what each step did to this .jsonl file: row, step, position, token, probability."""

    def check(self) -> None:
        """Makes sure, before a model runs, that files can be written.

        Raises:
            ConfigError: they cannot.
        """
        for flag, path in (("--film", self.film), ("--trace", self.trace)):
            if path is not None:
                writable(flag, path)


ShowingFlags = Annotated[Showing, tyro.conf.arg(name="")]
