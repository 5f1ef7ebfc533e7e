"""Files that a name means: one rule for everything that reads text.

A path that exists is that path, whatever characters it holds; only a name that does not exist is a
pattern. Patterns are matched here and not by `glob`. It passes over folders that it cannot read
and does not count what it leaves out. Where linked folders lead to each other it does not end.
"""

import fnmatch
import os
import stat
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from textdiff.data.document_stream import EMPTY, files_in_words, no_text
from textdiff.data.formats import READABLE, is_saved, known_kind, saved_files, suffixes
from textdiff.errors import DataError

_ALL_BELOW = ("**", "*")


@dataclass(frozen=True)
class Files:
    """Text files that a name means.

    Attributes:
        name: the name.
        paths: the files, sorted by the parts of their paths.
        left_out: numbers of files that are not read, by the reason.
        several: whether the name is a folder or a pattern: one of its files may hold no text.
    """

    name: str
    paths: tuple[Path, ...]
    left_out: Counter[str]
    several: bool = False


def find_files(name: str) -> Files:
    """Find the files of a path, of all folders below one, or of a pattern.

    Raises:
        DataError: there is none, or a folder cannot be read.
    """
    path = existing(name)
    if path is not None and not path.is_dir():
        return Files(name, (path,), Counter())
    if path is not None and is_saved(path):
        return Files(name, saved_files(path), Counter())
    if path is not None:
        return _chosen(name, _Search(path, _ALL_BELOW, 0), "no text files in this folder")
    if has_magic(name):
        base, pattern = _pattern(os.path.expanduser(name))
        search = _Search(base, (*pattern, *_ALL_BELOW), len(pattern))
        return _chosen(name, search, "no text file matches this pattern")
    raise missing(name)


def missing(name: str) -> DataError:
    """Return the error for a name that is not in the file system."""
    shown = name[:200] or "an empty name"
    return DataError(f"{shown}: no such file or folder; check the path", code="no_file")


def existing(name: str) -> Path | None:
    """Return the path of a name that exists as it is spelled, or with `~` expanded.

    Raises:
        DataError: a link that leads nowhere, or a folder that may not be searched.
    """
    for spelling in dict.fromkeys((name, os.path.expanduser(name))):
        try:
            os.stat(spelling)
        except PermissionError as error:
            raise _unreadable(spelling, error) from None
        except (OSError, ValueError):  # missing, too long, or not the name of a file at all
            if os.path.islink(spelling):
                raise DataError(
                    f"{name}: a link to {os.readlink(spelling)}, which cannot be reached",
                    code="broken_link",
                ) from None
            continue
        return Path(spelling)
    return None


def _pattern(name: str) -> tuple[Path, list[str]]:
    """Split a pattern into the folder that it starts from and the names to match below it."""
    names = Path(name).parts
    count = next(number for number, each in enumerate(names) if has_magic(each))
    rest = list(names[count:])
    if name.endswith("/"):  # folders alone, and so all files below them
        rest.append("**")
    if rest[-1] == "**":
        rest.append("*")
    return Path(*names[:count]), rest


@dataclass(frozen=True)
class _Match:
    """A file that a search met.

    Attributes:
        path: its path.
        named: whether the pattern itself matches it, not a folder above it.
        links: number of links that lead to it.
    """

    path: Path
    named: bool
    links: int


def _chosen(name: str, search: "_Search", nothing: str) -> Files:
    """Return the files of a search that are text, in order, each real file once.

    Where no match of a pattern has the suffix of a text, the pattern itself says that they are text
    (`*.py`): they are taken as files that were named.
    """
    search.run()
    left_out = search.left_out
    matches = _without_copies(search)
    known = [match for match in matches if known_kind(match.path)]
    named = [match for match in matches if match.named]
    if known or not named:
        left_out.update(
            "".join(suffixes(match.path)) or "without a suffix"
            for match in matches
            if not known_kind(match.path)
        )
    chosen = [match.path for match in known or named]
    if not chosen:
        why = f" (left out: {files_in_words(left_out)})" if left_out else ""
        raise DataError(f"{name}: {nothing}{why}; textdiff reads {READABLE}", code="no_text_files")
    filled = tuple(path for path in chosen if path.stat().st_size)
    if not filled:
        raise no_text(name, several=True)
    left_out[EMPTY] += len(chosen) - len(filled)
    return Files(name, filled, +left_out, several=True)  # without counts of zero


def _without_copies(search: "_Search") -> list[_Match]:
    """Leave out links to files that are also matched themselves."""
    linked = any(match.links for match in search.matches)
    first: dict[str, _Match] = {}
    for match in sorted(search.matches, key=lambda match: (match.links, match.path.parts)):
        real = os.path.realpath(match.path) if linked else str(match.path)
        first.setdefault(real, match)
    copies = len(search.matches) - len(first)
    if copies:
        search.left_out["links to files that are read"] += copies
    return sorted(first.values(), key=lambda match: match.path.parts)


class _Search:
    """Search for the files that match the names of a pattern, links to folders followed.

    Each real folder is visited once for each name of the pattern. Links to folders further up thus
    come to an end and count nothing twice.

    Args:
        base: the folder to start from.
        components: names of the pattern; the last two match everything below a matched folder.
        below: number of the first of these two.
    """

    def __init__(self, base: Path, components: Sequence[str], below: int) -> None:
        self.base, self.components, self.below = base, components, below
        self.matches: list[_Match] = []
        self.left_out: Counter[str] = Counter()
        self._names: set[tuple[int, int, str]] = set()
        self._visited: set[tuple[int, int, int]] = set()
        # Real folders before linked ones, so that files get the path where they really are.
        self._real: deque[tuple[Path, int, int]] = deque()
        self._linked: deque[tuple[Path, int, int]] = deque()

    def run(self) -> None:
        """Fill `matches` and `left_out`.

        Raises:
            DataError: a folder cannot be read.
        """
        self._real.append((self.base, 0, 0))
        while self._real or self._linked:
            self._visit(*(self._real or self._linked).popleft())

    def _visit(self, folder: Path, at: int, links: int) -> None:
        try:
            place = os.stat(folder)
        except FileNotFoundError:  # a name without wildcards
            return
        except OSError as error:
            raise _unreadable(folder, error) from None
        if (place.st_dev, place.st_ino, at) in self._visited or not stat.S_ISDIR(place.st_mode):
            return
        self._visited.add((place.st_dev, place.st_ino, at))
        component = self.components[at]
        if component == "..":
            self._push(folder / "..", at + 1, links)
            return
        if component == "**":
            self._push(folder, at + 1, links)
        entries = _entries(folder)
        exact = any(entry.name == component for entry in entries)  # such a name is not a pattern
        for entry in entries:
            path, linked = folder / entry.name, links + entry.is_symlink()
            if component == "**":
                if not entry.name.startswith(".") and _type_of(entry) == "folder":
                    self._push(path, at, linked)
            elif entry.name == component if exact else _matches(entry.name, component):
                self._take(entry, place, _Match(path, at < self.below, linked), at)
            elif at > self.below and self._is_new(place, entry.name):
                self.left_out["hidden"] += 1

    def _take(
        self, entry: "os.DirEntry[str]", place: os.stat_result, match: _Match, at: int
    ) -> None:
        """Take an entry whose name matches: go on in a folder, keep a file."""
        kind = _type_of(entry)
        if kind == "folder":
            self._go_on(match.path, at, match.links)
        elif self._ends(at) and self._is_new(place, entry.name):
            if kind == "file":
                self.matches.append(match)
            else:
                self.left_out[kind] += 1

    def _push(self, folder: Path, at: int, links: int) -> None:
        (self._linked if links else self._real).append((folder, at, links))

    def _ends(self, at: int) -> bool:
        """Return whether a name is the last one of the pattern, or of what is below a folder."""
        return at + 1 in (self.below, len(self.components))

    def _go_on(self, path: Path, at: int, links: int) -> None:
        """Go on in a folder that matches a name, or with all below it."""
        if not self._ends(at):
            self._push(path, at + 1, links)
        elif at < self.below and tuple(self.components[at - 1 : at + 1]) != _ALL_BELOW:
            self._push(path, self.below, links)

    def _is_new(self, place: os.stat_result, name: str) -> bool:
        """Return whether a name in a folder is met for the first time."""
        key = (place.st_dev, place.st_ino, name)
        new = key not in self._names
        self._names.add(key)
        return new


def _matches(name: str, component: str) -> bool:
    hidden = name.startswith(".") and not component.startswith(".")
    return not hidden and fnmatch.fnmatchcase(name, component)


def _entries(folder: Path) -> "list[os.DirEntry[str]]":
    """Return the entries of a folder, sorted.

    Raises:
        DataError: it cannot be read: a corpus does not get smaller silently.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _type_of(entry: "os.DirEntry[str]") -> str:
    """Return folder, file or why an entry is neither, links followed.

    Raises:
        DataError: the target of a link may not be looked at.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        entry.stat()
    except PermissionError as error:
        raise _unreadable(entry.path, error) from None
    except OSError:  # its target is missing, or leads back to it
        return "broken links"
    return "not regular files"


def _unreadable(path: str | Path, error: OSError) -> DataError:
    """Return the error for a place that may not be looked into."""
    reason = (error.strerror or str(error)).lower()
    return DataError(
        f"{error.filename or path}: cannot be read ({reason}); change its rights, or leave it out "
        "by a pattern of the files to read",
        code="unreadable",
    )
