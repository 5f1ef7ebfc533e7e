"""Texts in a terminal while they are denoised."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.job import Job
from textdiff.sampling.step import Step
from textdiff.view.cells import Cell, Kind, Reader
from textdiff.view.progress import ECHO
from textdiff.view.recorders import RowStep, RowSteps, given_of

SECONDS = 4.0
"""Fast models are slowed down, so that a whole animation takes about so long."""

_FRAME = 0.04  # seconds between pictures at least, since drawing costs time
_LEAST = 3  # lines of a row


@dataclass
class Shown:
    """Row on the screen.

    Attributes:
        title: what it is called.
        prompt: tokens that it began with.
        given: positions that were given.
        change: its last step.
        call: the network call that this was.
        tokens: how many of its open places hold a token.
        hidden: how many of its first tokens are not shown.
        masks: whether it has had masks to be filled.
        done: whether it is finished.
    """

    title: str
    prompt: list[int]
    given: set[int]
    hidden: int = 0
    change: RowStep | None = None
    call: int = 0
    tokens: int = 0
    masks: bool = False
    done: bool = False


class LiveRows(Callback):
    """Live view of a job's rows and of the tokens per call.

    Committed tokens are plain, those of this step highlighted, drafts dimmed, tokens that were
    masked again underlined, given ones bold.

    Args:
        console: a terminal that can move its cursor.
        reader: makes cells of tokens.
        rows: rows of the whole generation.
        calls: network calls expected.
        answers: show what follows the prompts alone.
    """

    parts = ("draft", "entropy")

    def __init__(
        self, console: Console, reader: Reader, rows: int, calls: int, answers: bool = False
    ):
        self.console, self.reader, self.total, self.answers = console, reader, rows, answers
        self.pause = SECONDS / max(1, calls)
        self.steps = RowSteps(reader.mask)
        self.rows: list[Shown] = []
        self.calls = self.calls_before = self.begun = self.finished_rows = 0
        self.tokens_before = self.row_calls = self.row_calls_before = 0
        self.dependence = 0.0
        self.drawn = 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "LiveRows":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.update(Text(""))
        self.live.stop()

    def begin(self, job: Job) -> None:
        """Show the prompts."""
        self.steps.begin(job)
        self.calls_before, self.row_calls_before = self.calls, self.row_calls
        self.tokens_before = self._tokens()
        self.begun += len(job.prompts)
        self.rows = [
            Shown(
                f"sample {index + 1}",
                *given_of(prompt, self.reader.mask),
                hidden=len(job.leading(row)) if self.answers else 0,
            )
            for row, ((_, index), prompt) in enumerate(zip(job.row_keys, job.prompts, strict=True))
        ]

    def step(self, step: Step) -> None:
        """Show what changed; waits where the model is faster than the eye."""
        self.calls = self.calls_before + step.calls
        self.row_calls = self.row_calls_before + step.rows
        for change in self.steps.split(step):
            self.dependence += change.dependence or 0.0
            row = self.rows[change.row]
            row.change, row.call = change, self.calls
            row.masks = row.masks or self.reader.mask in change.ids
            places = enumerate(change.ids)
            row.tokens = sum(t != self.reader.mask for at, t in places if at not in row.given)
        now = time.monotonic()
        if now - self.drawn >= _FRAME or self.pause >= _FRAME:
            self.live.update(self.picture(), refresh=True)
            self.drawn = time.monotonic()
        time.sleep(max(0.0, self.pause - (time.monotonic() - now)))

    def finished(self, row: int, result: FinishedRow) -> None:
        """Note a row that is done, which gives its place to others."""
        self.rows[row].done = True
        self.finished_rows += 1

    def picture(self) -> Group:
        """Return the whole picture: rows, and a line of figures below."""
        width, height = self.console.width, self.console.height - 2
        several = len(self.rows) > 1
        room = max(1, height // (_LEAST + 1)) if several else 1
        order = sorted(range(len(self.rows)), key=lambda row: (self.rows[row].done, row))
        chosen = [self.rows[number] for number in sorted(order[:room])]
        each = max(1, height // len(chosen) - several)
        lines: list[Text] = []
        for row in chosen:
            if several:
                lines.append(_heading(row, width))
            laid = lay_out(self._cells(row)[row.hidden :], width)
            busy = self._busy(row) - row.hidden
            lines += [line.text() for line in visible_lines(laid, each, busy)]
        return Group(*lines, self.figures(width - ECHO))

    def figures(self, width: int) -> Text:
        """Return the status line."""
        parts = [f"call {self.calls}", f"{self._tokens() / max(1, self.row_calls):.1f} tokens/call"]
        if self.total > 1:
            parts.insert(1, f"{self.finished_rows}/{self.total} done")
        nats = f"{self.dependence / max(1, self.begun):.2f} nats"
        words, brief = (" · ".join([*parts, f"{what}{nats}"]) for what in ("dependence ", "≤ "))
        text = Text(words if len(words) <= width else brief, style="reverse", no_wrap=True)
        text.truncate(width, overflow="ellipsis", pad=True)
        return text

    def _tokens(self) -> int:
        return self.tokens_before + sum(row.tokens for row in self.rows)

    def _cells(self, row: Shown) -> list[Cell]:
        change = row.change
        if change is None:
            return self.reader.cells(row.prompt, None, row.given, (), ())
        news = row.call == self.calls
        fresh, lost = (change.confidence, change.remasked) if news else ((), ())
        return self.reader.cells(change.ids, change.draft, row.given, fresh, lost)

    def _busy(self, row: Shown) -> int:
        """Return the first position that may still change."""
        ids = row.prompt if row.change is None else row.change.ids
        open_positions = (at for at, token in enumerate(ids) if token == self.reader.mask)
        otherwise = row.change.final if row.change and not row.masks else len(ids) - 1
        return next(open_positions, otherwise)


def _heading(row: Shown, width: int) -> Text:
    title = f"── {row.title}{' · done' if row.done else ''} "
    return Text(title.ljust(width, "─")[:width], style="dim", no_wrap=True)


STYLES: dict[Kind, str] = {
    Kind.GIVEN: "bold",
    Kind.KEPT: "",
    Kind.FRESH: "reverse green",
    Kind.DRAFT: "dim",
    Kind.OPEN: "dim",
    Kind.LOST: "underline magenta",
    Kind.CUT: "dim",
}
"""Distinct without colours, too: bold, reversed, dim, underlined."""


@dataclass
class Line:
    """Line of the screen.

    Attributes:
        parts: (text, kind, position) of its characters.
        width: columns that they take.
    """

    parts: list[tuple[str, Kind, int]] = field(default_factory=list)
    width: int = 0

    def add(self, character: tuple[str, Kind, int]) -> None:
        """Append a character."""
        self.parts.append(character)
        self.width += cell_len(character[0])

    def text(self) -> Text:
        """Return the line with its styles."""
        shown = Text(no_wrap=True)
        for character, kind, _ in self.parts:
            shown.append(character, STYLES[kind])
        return shown


def lay_out(cells: Sequence[Cell], width: int) -> list[Line]:
    """Return the lines of a row; a word that does not fit begins the next one."""
    lines = [Line()]
    for position, cell in enumerate(cells):
        for character in cell.text:
            if character == "\n":
                lines.append(Line())
                continue
            if lines[-1].width + cell_len(character) > width:
                lines.append(_break(lines[-1], character))
            lines[-1].add((character, cell.kind, position))
    return lines


def _break(line: Line, coming: str) -> Line:
    """Take the unfinished word from a full line, unless it is the whole of it."""
    rest = Line()
    if coming == " ":
        return rest
    start = len(line.parts)
    while start and line.parts[start - 1][0] != " ":
        start -= 1
    if start == 0:
        return rest
    moved, line.parts = line.parts[start:], line.parts[:start]
    for character in moved:
        rest.add(character)
    return rest


def visible_lines(lines: list[Line], height: int, busy: int) -> list[Line]:
    """Return as many lines as fit, around those that are being written.

    Args:
        lines: all lines.
        height: room.
        busy: the first position that may still change.
    """
    if len(lines) <= height:
        return lines
    first = next(
        (at for at, line in enumerate(lines) if any(p >= busy for _, _, p in line.parts)),
        len(lines) - 1,
    )
    start = max(0, min(first - 1, len(lines) - height))
    return lines[start : start + height]
