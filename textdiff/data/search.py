"""A search for the files that match the parts of a pattern, links to folders followed.

Each real folder is visited once for each part of the pattern, so that links to folders further up
come to an end and count nothing twice.
"""

import fnmatch
import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from textdiff.errors import DataError

ALL_BELOW = ("**", "*")


@dataclass(frozen=True)
class Match:
    """A file that was found.

    Attributes:
        path: where.
        named: whether the pattern itself matches it, not a folder above it.
        linked: number of links that lead to it.
    """

    path: Path
    named: bool
    linked: int

    @property
    def order(self) -> tuple[str, ...]:
        """The key to sort by."""
        return self.path.parts


@dataclass(frozen=True)
class _Entry:
    """A name in a folder.

    Attributes:
        name: the name.
        linked: whether it is a link.
        kind: of what it is or leads to.
    """

    name: str
    linked: bool
    kind: str  # folder, file, or why it is neither


class Search:
    """Matches the parts of a pattern against a folder and what is below it.

    Args:
        base: the folder.
        parts: of the pattern; the last two match everything below a folder that is matched.
        below: number of the first of these two.
    """

    def __init__(self, base: Path, parts: Sequence[str], below: int) -> None:
        self.base, self.parts, self.below = base, parts, below
        self.matches: list[Match] = []
        self.left_out: Counter[str] = Counter()
        self._taken: set[tuple[int, int, str]] = set()
        self._seen: set[tuple[int, int, int]] = set()
        # Real folders before linked ones, so that files are found where they are.
        self._real: deque[tuple[Path, int, int]] = deque()
        self._links: deque[tuple[Path, int, int]] = deque()

    def run(self) -> None:
        """Searches.

        Raises:
            DataError: a folder cannot be read.
        """
        self._real.append((self.base, 0, 0))
        while self._real or self._links:
            self._visit(*(self._real or self._links).popleft())

    def _visit(self, folder: Path, at: int, linked: int) -> None:
        try:
            place = os.stat(folder)
        except FileNotFoundError:  # a part of a pattern without wildcards
            return
        except OSError as error:
            raise unreadable(folder, error) from None
        if (place.st_dev, place.st_ino, at) in self._seen or not stat.S_ISDIR(place.st_mode):
            return
        self._seen.add((place.st_dev, place.st_ino, at))
        part = self.parts[at]
        if part == "..":
            self._push(folder / "..", at + 1, linked)
            return
        if part == "**":
            self._push(folder, at + 1, linked)
        entries = _entries(folder)
        exact = any(entry.name == part for entry in entries)  # such a name is not a pattern
        for entry in entries:
            path, through = folder / entry.name, linked + entry.linked
            if part == "**":
                if entry.kind == "folder" and not entry.name.startswith("."):
                    self._push(path, at, through)
            elif entry.name == part if exact else _matches(entry.name, part):
                if entry.kind == "folder":
                    self._go_on(path, at, through)
                elif self._ends(at) and self._is_new(place, entry.name):
                    self._keep(Match(path, at < self.below, through), entry.kind)
            elif at > self.below and self._is_new(place, entry.name):
                self.left_out["hidden"] += 1

    def _push(self, folder: Path, at: int, linked: int) -> None:
        (self._links if linked else self._real).append((folder, at, linked))

    def _ends(self, at: int) -> bool:
        """Whether a part is the last one of the pattern, or of what is below a folder."""
        return at + 1 in (self.below, len(self.parts))

    def _go_on(self, path: Path, at: int, linked: int) -> None:
        """Goes on in a folder that matches a part, or with all below it."""
        if not self._ends(at):
            self._push(path, at + 1, linked)
        elif at < self.below and tuple(self.parts[at - 1 : at + 1]) != ALL_BELOW:
            self._push(path, self.below, linked)

    def _is_new(self, place: os.stat_result, name: str) -> bool:
        """Whether a name in a folder is met for the first time."""
        key = (place.st_dev, place.st_ino, name)
        new = key not in self._taken
        self._taken.add(key)
        return new

    def _keep(self, match: Match, kind: str) -> None:
        if kind == "file":
            self.matches.append(match)
        else:
            self.left_out[kind] += 1


def _matches(name: str, part: str) -> bool:
    if name.startswith(".") and not part.startswith("."):
        return False
    return fnmatch.fnmatchcase(name, part)


def _entries(folder: Path) -> list[_Entry]:
    """The names in a folder, sorted.

    Raises:
        DataError: it cannot be read: a corpus does not get smaller without a word.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
            return [_Entry(entry.name, entry.is_symlink(), _kind(entry)) for entry in entries]
    except OSError as error:
        raise unreadable(folder, error) from None


def _kind(entry: "os.DirEntry[str]") -> str:
    """What an entry is, links followed."""
    if not entry.is_symlink():
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        return "file" if entry.is_file(follow_symlinks=False) else "not regular files"
    try:
        mode = os.stat(entry.path).st_mode
    except PermissionError:
        raise
    except OSError:  # its target is missing, or leads back to it
        return "broken links"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "not regular files"


def unreadable(path: str | Path, error: OSError) -> DataError:
    """The error for a place that may not be looked into."""
    reason = (error.strerror or str(error)).lower()
    return DataError(
        f"{error.filename or path}: cannot be read ({reason}); change its rights, or leave it out "
        "by a pattern of the files to read"
    )
