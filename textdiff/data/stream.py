"""A tokenised corpus on disk, seen as one long array."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from textdiff.storage import file_hash

DESCRIPTION_NAME = "description.json"


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
        description = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        self.shards: list[dict[str, Any]] = description["shards"]
        columns: list[pa.LargeListArray] = []
        lasts: list[NDArray[np.bool_]] = []
        for shard in self.shards:
            path = folder / shard["name"]
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path} has not the size it was written with")
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            for tokens, last in zip(table["tokens"].chunks, table["last"].chunks, strict=True):
                columns.append(tokens)
                lasts.append(last.to_numpy(zero_copy_only=False))
        self._chunks = [_values(chunk) for chunk in columns if len(chunk.values)]
        # First position of every chunk, and the total.
        self._starts = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._ends = _document_ends(columns, lasts)
        self.num_documents = len(self._ends)
        found = (self.num_documents, len(self))
        if found != (description["documents"], description["tokens"]):
            raise ValueError(f"{folder} holds other documents than its description says")

    @classmethod
    def open(cls, folder: Path) -> "TokenStream | None":
        """Opens a cache entry; None if it is missing, incomplete or visibly damaged.

        Sizes and counts are compared, values are not: `damaged` does that.
        """
        try:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def damaged(self, progress: Callable[[int], None] = lambda size: None) -> list[str]:
        """Reads every file and returns the names of those that are not what was written.

        Args:
            progress: told the bytes read since it was told before.
        """
        return [
            shard["name"]
            for shard in self.shards
            if file_hash(self.folder / shard["name"], progress=progress) != shard["sha256"]
        ]

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path]]:
        return TokenStream, (self.folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of every document, its end-of-text token included, int64 [documents]."""
        return np.diff(self._ends, prepend=0)

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Returns the tokens at `start <= position < stop`, int32 [stop - start].

        The array is a read-only view of the file unless it crosses a chunk of some million tokens.

        Raises:
            IndexError: the range does not lie in the stream.
        """
        self._check(start, stop)
        if start == stop:
            return np.empty(0, np.int32)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left")) - 1
        parts = [
            self._chunks[i][max(start - int(self._starts[i]), 0) : stop - int(self._starts[i])]
            for i in range(first, last + 1)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def documents(self, start: int, stop: int) -> NDArray[np.int32]:
        """Returns the document index of the tokens at the positions of `read`, int32.

        Raises:
            IndexError: the range does not lie in the stream.
        """
        self._check(start, stop)
        if start == stop:
            return np.empty(0, np.int32)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop - 1, side="right"))
        edges = np.minimum(self._ends[first : last + 1], stop)
        counts = np.diff(edges, prepend=start)
        return np.repeat(np.arange(first, last + 1, dtype=np.int32), counts)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start}:{stop} of a stream of {len(self)}")


def _values(column: pa.LargeListArray) -> NDArray[np.int32]:
    values: NDArray[np.int32] = column.values.to_numpy(zero_copy_only=True)
    return values


def _document_ends(
    columns: list[pa.LargeListArray], lasts: list[NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Position after the last token of every document, int64 [documents]."""
    ends, start = [np.empty(0, np.int64)], 0
    for column, last in zip(columns, lasts, strict=True):
        offsets = column.offsets.to_numpy().astype(np.int64)
        ends.append(start + offsets[1:][last])
        start += int(offsets[-1])
    return np.concatenate(ends)
