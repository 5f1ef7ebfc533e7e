"""Cells laid out on lines of a terminal: broken at words, wide characters counted as they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.text import Text

from textdiff.view.cells import Cell, Kind

STYLES: dict[Kind, str] = {
    Kind.GIVEN: "bold",
    Kind.KEPT: "",
    Kind.FRESH: "reverse green",
    Kind.DRAFT: "dim",
    Kind.OPEN: "dim",
    Kind.LOST: "underline magenta",
    Kind.CUT: "dim",
}
"""Told apart without colours, too: bold, reversed, dim, underlined."""


@dataclass
class Line:
    """One line of the screen.

    Attributes:
        parts: (text, kind, position) of its characters.
        width: columns that they take.
    """

    parts: list[tuple[str, Kind, int]] = field(default_factory=list)
    width: int = 0

    def add(self, part: tuple[str, Kind, int]) -> None:
        """Appends a character."""
        self.parts.append(part)
        self.width += cell_len(part[0])

    def text(self) -> Text:
        """With its styles."""
        shown = Text(no_wrap=True)
        for character, kind, _ in self.parts:
            shown.append(character, STYLES[kind])
        return shown


def lay_out(cells: Sequence[Cell], width: int) -> list[Line]:
    """The lines of a row; a word that does not fit begins the next one."""
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
    """Takes the unfinished word from a full line, unless it is the whole of it."""
    rest = Line()
    if coming == " ":
        return rest
    start = len(line.parts)
    while start and line.parts[start - 1][0] != " ":
        start -= 1
    if start == 0:
        return rest
    moved, line.parts = line.parts[start:], line.parts[:start]
    for part in moved:
        rest.add(part)
    return rest


def visible_lines(lines: list[Line], height: int, busy: int) -> list[Line]:
    """As many lines as there is room for, so that what is being written can be seen.

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
