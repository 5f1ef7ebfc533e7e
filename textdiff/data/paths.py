"""Which files a name means: one rule for everything that reads text.

A path that exists is that path, whatever characters it holds; only what does not exist is a
pattern.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path

from textdiff.data.document_stream import EMPTY, blank, files_in_words
from textdiff.data.formats import READABLE, known_kind, suffixes
from textdiff.data.search import ALL_BELOW, Match, Search, unreadable
from textdiff.errors import DataError

_SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class Files:
    """The text files that a name means.

    Attributes:
        name: the name.
        paths: the files, sorted by the parts of their paths.
        left_out: numbers of files that are not read, by the reason.
        several: whether the name is a folder or a pattern: one of its files may hold no text.
    """

    name: str
    paths: tuple[Path, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    several: bool = False


def find_files(name: str) -> Files:
    """Finds the files of a path, of all folders below one, or of a pattern.

    Raises:
        DataError: there is none, or a folder cannot be read.
    """
    path = existing(name)
    if path is not None and not path.is_dir():
        return Files(name, (path,))
    if path is not None and is_saved(path):
        return Files(name, _saved_files(path))
    if path is not None:
        return _chosen(name, Search(path, ALL_BELOW, 0), "no text files in this folder")
    if has_magic(name):
        base, parts = _pattern(os.path.expanduser(name))
        search = Search(base, (*parts, *ALL_BELOW), len(parts))
        return _chosen(name, search, "no text file matches this pattern")
    raise missing(name)


def is_saved(folder: Path) -> bool:
    """Returns whether a folder is one that `save_to_disk` of `datasets` writes."""
    names = ("state.json", "dataset_info.json")
    return (folder / _SPLITS).is_file() or all((folder / name).is_file() for name in names)


def _saved_files(folder: Path) -> tuple[Path, ...]:
    """The files of a saved data set, in its order.

    Raises:
        DataError: it holds several splits, or cannot be read.
    """
    if (folder / _SPLITS).is_file():
        raise DataError(f"{folder}: holds splits of a data set; name the folder of one of them")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return tuple(folder / file["filename"] for file in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: not a readable save_to_disk folder") from None


def missing(name: str) -> DataError:
    """The error for a name that is not in the file system."""
    return DataError(f"{name[:200] or 'an empty name'}: no such file or folder; check the path")


def existing(name: str) -> Path | None:
    """Returns the path of a name that exists as it is spelled, or with `~` expanded.

    Raises:
        DataError: a link that leads nowhere, or a folder that may not be searched.
    """
    for spelling in dict.fromkeys((name, os.path.expanduser(name))):
        try:
            os.stat(spelling)
        except PermissionError as error:
            raise unreadable(spelling, error) from None
        except (OSError, ValueError):  # not there, too long, or not the name of a file at all
            if os.path.islink(spelling):
                target = os.readlink(spelling)
                raise DataError(f"{name}: a link to {target}, which cannot be reached") from None
            continue
        return Path(spelling)
    return None


def _pattern(name: str) -> tuple[Path, list[str]]:
    """Splits a pattern into the folder that it starts from and the parts to match below it."""
    parts = Path(name).parts
    count = next(number for number, part in enumerate(parts) if has_magic(part))
    rest = list(parts[count:])
    if name.endswith("/"):  # folders alone, and so all files below them
        rest.append("**")
    if rest[-1] == "**":
        rest.append("*")
    return Path(*parts[:count]), rest


def _chosen(name: str, search: "Search", nothing: str) -> Files:
    """The files of a search that are text, in order, each real file once.

    Where no match of a pattern has the suffix of a text, the pattern itself says that they are text
    (`*.py`): they are taken as files that were named.
    """
    search.run()
    left_out = search.left_out
    matches = _without_copies(search.matches, left_out)
    named = [match for match in matches if match.named]
    if named and not any(known_kind(match.path) for match in matches):
        matches = named
    else:
        for match in matches:
            if not known_kind(match.path):
                left_out["".join(suffixes(match.path)) or "without a suffix"] += 1
        matches = [match for match in matches if known_kind(match.path)]
    paths = [match.path for match in matches]
    if not paths:
        why = f" (left out: {files_in_words(left_out)})" if left_out else ""
        raise DataError(f"{name}: {nothing}{why}; textdiff reads {READABLE}")
    filled = tuple(path for path in paths if path.stat().st_size)
    if not filled:
        raise blank(name)
    if len(filled) < len(paths):
        left_out[EMPTY] += len(paths) - len(filled)
    return Files(name, filled, dict(left_out), several=True)


def _without_copies(matches: Sequence[Match], left_out: Counter[str]) -> list[Match]:
    """Leaves out links to files that are there already."""
    if any(match.linked for match in matches):
        first: dict[str, Match] = {}
        for match in sorted(matches, key=lambda match: (match.linked, match.order)):
            first.setdefault(os.path.realpath(match.path), match)
        if len(first) < len(matches):
            left_out["links to files that are read"] += len(matches) - len(first)
        matches = list(first.values())
    return sorted(matches, key=lambda match: match.order)
