"""A tokenised corpus on disk: a folder of Arrow files (shards), read as one long array."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from textdiff.storage import file_hash

DESCRIPTION = "description.json"
_CHECKED = "checked.json"
_TICK = 2_000_000_000  # nanoseconds by which times of files may be rounded

Piece = tuple[NDArray[np.int32], bool]
"""Tokens of a piece, int32 [tokens], and whether its document ends with it."""


class TokenStream:
    """All tokens of a corpus in order, memory-mapped.

    A cache entry is a folder of Arrow files ("shards") and a description that lists them with their
    sizes and hashes. Pickling keeps the path only, so that data-loader processes map the same
    files.

    Attributes:
        folder: the cache entry.
        num_documents: documents in the stream.
        shards: the description of every file.

    Args:
        folder: a complete cache entry; use `open` where it may be damaged.

    Raises:
        ValueError: the entry's parts contradict each other (also as `OSError`, `KeyError` or
            `pyarrow.ArrowException` by what reads them).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.shards: list[dict[str, Any]] = description["shards"]
        columns: list[pa.LargeListArray] = []
        lasts: list[NDArray[np.bool_]] = []
        for shard in self.shards:
            path = folder / shard["name"]
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path} does not have the size it was written with")
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            for tokens, last in zip(table["tokens"].chunks, table["last"].chunks, strict=True):
                columns.append(tokens)
                lasts.append(last.to_numpy(zero_copy_only=False))
        self._chunks = [_values(chunk) for chunk in columns if len(chunk.values)]
        # First position of every chunk, and the total.
        self._starts = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._columns, self._last = columns, np.concatenate([np.empty(0, bool), *lasts])
        self._ends: NDArray[np.int64] = _piece_ends(columns)[self._last]
        self.num_documents = len(self._ends)
        counts = (self.num_documents, len(self))
        if counts != (description["documents"], description["tokens"]):
            raise ValueError(f"{folder} holds other documents than its description says")

    @classmethod
    def open(cls, folder: Path) -> "TokenStream | None":
        """Open a cache entry; None if it is missing, incomplete or visibly damaged.

        Sizes and counts are compared, values are not: `damaged` does that.
        """
        try:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def damaged(self, changed_only: bool = False) -> list[str]:
        """Read files and return the names of those that are not what was written.

        Sizes and times of files are noted where all of them are.

        Args:
            changed_only: read those alone whose size or time is not the one noted.
        """
        noted = _noted(self.folder) if changed_only else {}
        doubted = [s for s in self.shards if noted.get(s["name"]) != _state(self.folder, s)]
        bad = [s["name"] for s in doubted if file_hash(self.folder / s["name"]) != s["sha256"]]
        if doubted and not bad:
            note_states(self.folder, self.shards)
        return bad

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path]]:
        return TokenStream, (self.folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, its end-of-text token included, int64 [documents]."""
        return np.diff(self._ends, prepend=0)

    def edges(self, document: int) -> NDArray[np.int64]:
        """Return where the pieces of a document begin and end, int64 [pieces + 1]."""
        all_edges, pieces = self._pieces
        first, last = pieces[document : document + 2]
        return all_edges[first : last + 1]

    @cached_property
    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Edges of all pieces, [pieces + 1], and the first piece of each document.

        Conversations alone need them: of a large corpus they take gigabytes in every worker.
        """
        edges = np.append(0, _piece_ends(self._columns))
        return edges, np.append(0, np.flatnonzero(self._last) + 1)

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the tokens at `start <= position < stop`, int32 [stop - start].

        Files hold two bytes per token where the vocabulary allows it, and are copied from.

        Raises:
            IndexError: the range is not within the stream.
        """
        self._check(start, stop)
        if start == stop:
            return np.empty(0, np.int32)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left")) - 1
        views = [
            self._chunks[i][max(start - int(self._starts[i]), 0) : stop - int(self._starts[i])]
            for i in range(first, last + 1)
        ]
        whole = views[0] if len(views) == 1 else np.concatenate(views)
        return whole.astype(np.int32, copy=False)

    def documents(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the document index of the tokens at the positions of `read`, int64.

        Raises:
            IndexError: the range is not within the stream.
        """
        self._check(start, stop)
        if start == stop:
            return np.empty(0, np.int64)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop - 1, side="right"))
        edges = np.minimum(self._ends[first : last + 1], stop)
        counts = np.diff(edges, prepend=start)
        return np.repeat(np.arange(first, last + 1), counts)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")


def _values(column: pa.LargeListArray) -> NDArray[Any]:
    values: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
    return values


def _state(folder: Path, shard: dict[str, Any]) -> list[Any]:
    """Return what tells a changed file of an entry from an unchanged one."""
    state = (folder / shard["name"]).stat()
    return [state.st_size, state.st_mtime_ns, shard["sha256"]]


def _noted(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        noted = json.loads((folder / _CHECKED).read_text(encoding="utf-8"))
        return noted if isinstance(noted, dict) else {}
    return {}


def note_states(folder: Path, shards: Sequence[dict[str, Any]]) -> None:
    """Note sizes and times of files whose hashes are known to be right, where that is possible.

    A file that was written just now is left out: a change in the same tick would not show.
    """
    with suppress(OSError):
        states = {shard["name"]: _state(folder, shard) for shard in shards}
        latest = time.time_ns() - _TICK
        states = {name: state for name, state in states.items() if state[1] < latest}
        scratch = folder / f"{_CHECKED}.unfinished-{os.getpid()}"
        scratch.write_text(json.dumps(states, indent=1), encoding="utf-8")
        os.replace(scratch, folder / _CHECKED)


def _piece_ends(columns: list[pa.LargeListArray]) -> NDArray[np.int64]:
    """Return the position after the last token of every piece, int64 [pieces]."""
    ends, start = [np.empty(0, np.int64)], 0
    for column in columns:
        offsets = column.offsets.to_numpy().astype(np.int64)
        ends.append(start + offsets[1:])
        start += int(offsets[-1])
    return np.concatenate(ends)
