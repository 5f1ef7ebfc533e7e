"""Writing of a tokenised corpus: its files (shards), one after another, and their description."""

import json
import logging
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from textdiff.data.token_stream import DESCRIPTION, Piece
from textdiff.storage import file_hash

_log = logging.getLogger(__name__)

SHARDS_OF_A_SIZE = 256
"""Shards after which the next ones hold twice as much text. A corpus of 100 billion tokens, 450
billion characters, has 1,500 of them, which are mapped at once; the largest hold a billion."""


def token_schema(vocabulary: int) -> pa.Schema:
    """Return the columns of a shard: two bytes per token where all ids fit, else four."""
    ids = pa.uint16() if vocabulary <= 2**16 else pa.int32()
    return pa.schema(
        [
            ("tokens", pa.large_list(pa.field("item", ids, nullable=False))),
            pa.field("last", pa.bool_(), nullable=False),  # whether the document ends here
        ]
    )


class Shard:
    """One Arrow file of a cache entry while it is written, under a name that says so.

    Leaving its `with` block gives the file its name, or deletes it after an error.

    Args:
        folder: of the entry.
        number: of the shard.
        eos: id that ends documents; None: nothing does.
        vocabulary: ids are below it.
    """

    def __init__(self, folder: Path, number: int, eos: int | None, vocabulary: int) -> None:
        self.path = folder / _shard_name(number)
        self._unfinished = self.path.with_suffix(".unfinished")
        self._end = np.array([] if eos is None else [eos], dtype=np.int32)
        self._documents = self._tokens = 0
        self._schema = token_schema(vocabulary)
        self._file = pa.OSFile(str(self._unfinished), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write pieces of documents."""
        batch = _record_batch(pieces, self._end, self._schema)
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


def _record_batch(
    pieces: Sequence[Piece], end: NDArray[np.int32], schema: pa.Schema
) -> pa.RecordBatch:
    values = np.concatenate([x for ids, last in pieces for x in (ids, end if last else end[:0])])
    lengths = np.array([len(ids) + len(end) * last for ids, last in pieces], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    kind = schema[0].type
    stored = pa.array(values).cast(kind.value_type)  # refuses ids that do not fit
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), stored, type=kind)
    lasts = pa.array([last for _, last in pieces], pa.bool_())
    return pa.RecordBatch.from_arrays([lists, lasts], schema=schema)


def whole_shards(partial: Path) -> dict[int, dict[str, Any]]:
    """Return the shards of an unfinished (or damaged) entry that are whole, by number.

    All other files are deleted.
    """
    try:
        described = json.loads((partial / DESCRIPTION).read_text(encoding="utf-8"))
        numbered = {int(s["name"][len("tokens-") : -len(".arrow")]): s for s in described["shards"]}
        # Later shards of entries that do not say so are not larger than the first ones.
        most = math.inf if described.get("growing") else SHARDS_OF_A_SIZE
        listed = {number: dict(s) for number, s in numbered.items() if number < most}
        kept = {n: s for n, s in listed.items() if file_hash(partial / s["name"]) == s["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        listed = kept = {}
    for number in listed.keys() - kept.keys():
        _log.warning("%s is damaged and is encoded again", partial / _shard_name(number))
    names = {s["name"] for s in kept.values()} | {DESCRIPTION}
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
        "growing": True,
        "shards": listed,
    }
    scratch = partial / f"{DESCRIPTION}.unfinished"
    scratch.write_text(json.dumps(description, indent=1), encoding="utf-8")
    os.replace(scratch, partial / DESCRIPTION)
