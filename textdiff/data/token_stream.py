"""A tokenised corpus on disk: a folder of Arrow files (shards), read as one long array."""

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from textdiff.storage import file_hash

_DESCRIPTION = "description.json"
_SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.field("item", pa.int32(), nullable=False))),
        pa.field("last", pa.bool_(), nullable=False),  # whether the document ends with this piece
    ]
)

Piece = tuple[NDArray[np.int32], bool]
"""Tokens of a piece, int32 [tokens], and whether its document ends with it."""

_log = logging.getLogger(__name__)


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
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
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
        ends, last = _piece_ends(columns), np.concatenate([np.empty(0, bool), *lasts])
        self._edges = np.append(0, ends)  # of the pieces, [pieces + 1]
        self._pieces = np.append(0, np.flatnonzero(last) + 1)  # [documents + 1]
        self._ends: NDArray[np.int64] = ends[last]
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

    def damaged(self) -> list[str]:
        """Read every file and return the names of those that are not what was written."""
        return [s["name"] for s in self.shards if file_hash(self.folder / s["name"]) != s["sha256"]]

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
        first, last = self._pieces[document : document + 2]
        edges: NDArray[np.int64] = self._edges[first : last + 1]
        return edges

    def read(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the tokens at `start <= position < stop`, int32 [stop - start].

        The array is a read-only view of the file unless it crosses a chunk of some million tokens.

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
        return views[0] if len(views) == 1 else np.concatenate(views)

    def documents(self, start: int, stop: int) -> NDArray[np.int32]:
        """Return the document index of the tokens at the positions of `read`, int32.

        Raises:
            IndexError: the range is not within the stream.
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


def _piece_ends(columns: list[pa.LargeListArray]) -> NDArray[np.int64]:
    """Return the position after the last token of every piece, int64 [pieces]."""
    ends, start = [np.empty(0, np.int64)], 0
    for column in columns:
        offsets = column.offsets.to_numpy().astype(np.int64)
        ends.append(start + offsets[1:])
        start += int(offsets[-1])
    return np.concatenate(ends)


# --- writing -------------------------------------------------------------------------------------


class Shard:
    """One Arrow file of a cache entry while it is written, under a name that says so.

    Leaving its `with` block gives the file its name, or deletes it after an error.

    Args:
        folder: of the entry.
        number: of the shard.
        eos: id that ends documents; None: nothing does.
    """

    def __init__(self, folder: Path, number: int, eos: int | None) -> None:
        self.path = folder / _shard_name(number)
        self._unfinished = self.path.with_suffix(".unfinished")
        self._end = np.array([] if eos is None else [eos], dtype=np.int32)
        self._documents = self._tokens = 0
        self._file = pa.OSFile(str(self._unfinished), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write pieces of documents."""
        batch = _record_batch(pieces, self._end)
        self._writer.write_batch(batch)
        self._documents += sum(last for _, last in pieces)
        self._tokens += len(batch.column(0).values)

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._writer.close()
            self._file.close()
            os.replace(self._unfinished, self.path)
            return
        with suppress(OSError, pa.ArrowException):
            self._file.close()
        self._unfinished.unlink(missing_ok=True)

    def description(self) -> dict[str, Any]:
        """Return the size and the hash of the finished file, and what it holds."""
        return {
            "name": self.path.name,
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self.path.stat().st_size,
            "sha256": file_hash(self.path),
        }


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.arrow"


def _record_batch(pieces: Sequence[Piece], end: NDArray[np.int32]) -> pa.RecordBatch:
    values = np.concatenate([x for ids, last in pieces for x in (ids, end if last else end[:0])])
    lengths = np.array([len(ids) + len(end) * last for ids, last in pieces], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), type=_SCHEMA[0].type)
    lasts = pa.array([last for _, last in pieces], pa.bool_())
    return pa.RecordBatch.from_arrays([lists, lasts], schema=_SCHEMA)


def whole_shards(partial: Path) -> dict[int, dict[str, Any]]:
    """Return the shards of an unfinished (or damaged) entry that are whole, by number.

    All other files are deleted.
    """
    try:
        described = json.loads((partial / _DESCRIPTION).read_text(encoding="utf-8"))["shards"]
        listed = {int(s["name"][len("tokens-") : -len(".arrow")]): dict(s) for s in described}
        kept = {n: s for n, s in listed.items() if file_hash(partial / s["name"]) == s["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        listed = kept = {}
    for number in listed.keys() - kept.keys():
        _log.warning("%s is damaged and is encoded again", partial / _shard_name(number))
    names = {s["name"] for s in kept.values()} | {_DESCRIPTION}
    for path in partial.iterdir():
        if path.name not in names:
            path.unlink()
    return kept


def describe_shards(partial: Path, shards: dict[int, dict[str, Any]], eos: int | None) -> None:
    """Write the description of an entry that has these shards."""
    listed = [shards[number] for number in sorted(shards)]
    description = {
        "documents": sum(shard["documents"] for shard in listed),
        "tokens": sum(shard["tokens"] for shard in listed),
        "eos_token_id": eos,
        "shards": listed,
    }
    scratch = partial / f"{_DESCRIPTION}.unfinished"
    scratch.write_text(json.dumps(description, indent=1), encoding="utf-8")
    os.replace(scratch, partial / _DESCRIPTION)
