"""The file of a sweep: every finished point is saved, and a sweep goes on from there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from textdiff.errors import ConfigError, DataError
from textdiff.storage import whole_file

Record = Mapping[str, Any]
Point = dict[str, Any]

Identity = Callable[[Record], dict[str, Any]]
"""identity(record) -> what two parts of one sweep have in common, by the names of messages."""


def kept_points(path: Path, record: Record, identity: Identity) -> dict[str, Point]:
    """Return the points that an earlier part of the sweep has finished, by their keys.

    Args:
        path: the file; it may not exist yet.
        record: of the sweep, without points.
        identity: what two parts of one sweep have in common.

    Raises:
        ConfigError: the file is of another sweep, or no sweep at all.
    """
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        before, points = identity(saved), {p["key"]: p for p in saved["points"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"--output {path} exists and is not a sweep of this version; choose another file"
        ) from None
    now = identity(json.loads(json.dumps(record)))
    differing = [name for name, value in now.items() if before[name] != value]
    if differing:
        raise ConfigError(
            f"--output {path} holds another sweep: {differing[0]} differs; choose another file"
        )
    return points


def save_points(
    path: Path, record: Record, points: Mapping[str, Point], more: Record
) -> dict[str, Any]:
    """Write the sweep so far, whole or not at all; return it.

    Raises:
        DataError: the file cannot be written.
    """
    whole = {**record, **more, "points": list(points.values())}
    text = json.dumps(whole, indent=1, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {path} cannot be written ({error.strerror})") from None
    return whole
