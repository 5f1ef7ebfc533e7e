"""A tokenised corpus on disk, seen as one long array."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TOKENS_NAME = "tokens.arrow"
DESCRIPTION_NAME = "description.json"


class TokenStream:
    """All tokens of a corpus in order, memory-mapped.

    Pickling keeps the path only, so that data-loader processes map the same file.

    Attributes:
        folder: the cache entry.
        num_documents: documents in the stream.

    Args:
        folder: a complete cache entry; use `open` where it may be damaged.

    Raises:
        ValueError: the entry's parts contradict each other (also as `OSError`, `KeyError` or
            `pyarrow.ArrowException` by what reads them).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        description = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        path = folder / TOKENS_NAME
        if path.stat().st_size != description["bytes"]:
            raise ValueError(f"{path} has not the size it was written with")
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        columns = [chunk for chunk in table.column("tokens").chunks if len(chunk)]
        self._chunks = [_values(chunk) for chunk in columns]
        # First position of every chunk, and the total.
        self._starts = np.cumsum([0, *map(len, self._chunks)], dtype=np.int64)
        self._ends = _document_ends(columns)
        self.num_documents = len(self._ends)
        found = (self.num_documents, len(self))
        if found != (description["documents"], description["tokens"]):
            raise ValueError(f"{path} holds other documents than its description says")

    @classmethod
    def open(cls, folder: Path) -> "TokenStream | None":
        """Opens a cache entry; None if it is missing, incomplete or damaged."""
        try:
            return cls(folder)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
            return None

    def __reduce__(self) -> tuple[type["TokenStream"], tuple[Path]]:
        return TokenStream, (self.folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

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


def _document_ends(columns: list[pa.LargeListArray]) -> NDArray[np.int64]:
    """Position after the last token of every document, int64 [documents]."""
    ends, start = [np.empty(0, np.int64)], 0
    for column in columns:
        offsets = column.offsets.to_numpy().astype(np.int64)
        ends.append(start + offsets[1:])
        start += int(offsets[-1])
    return np.concatenate(ends)
