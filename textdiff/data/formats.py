"""Kinds of text files by the suffixes of their names, and how their bytes are opened.

A compression suffix is taken off first; of what is left the last suffix decides alone:
`notes.jsonl.txt` is plain text, `notes.txt.jsonl` holds JSON lines.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from textdiff.errors import DataError
from textdiff.storage import refuse_pointer

Kind = Literal["text", "lines", "json", "csv", "tsv", "parquet", "arrow"]

KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}

DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
"""Errors of a file that cannot be read, or be decompressed, to its end."""


class _Decompressed(io.RawIOBase):
    """A file that pyarrow decompresses: what the standard library of Python 3.11 cannot read."""

    def __init__(self, path: Path, codec: str) -> None:
        self._stream = pa.CompressedInputStream(pa.OSFile(str(path)), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._stream.close()
        super().close()


def _through_pyarrow(codec: str) -> Callable[[Path], Any]:
    def opened(path: Path) -> Any:
        stream: Any = _Decompressed(path, codec)
        return io.BufferedReader(stream)

    return opened


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _through_pyarrow("zstd"),
    ".lz4": _through_pyarrow("lz4"),
}

READABLE = f"{', '.join(KINDS)}, all but the last two also with {', '.join(_OPENERS)} behind them"
"""The suffixes as the end of a sentence."""


def suffixes(path: Path) -> tuple[str, str]:
    """Returns the suffix that decides, and that of a compression; the empty string: none."""
    inner, outer = Path(path.name.lower()), ""
    if inner.suffix in _OPENERS:
        inner, outer = Path(inner.stem), inner.suffix
    return inner.suffix, outer


def known_kind(path: Path) -> Kind | None:
    """Returns the kind of file that a name promises; None: its suffix is not one of text."""
    suffix, compression = suffixes(path)
    kind = KINDS.get(suffix)
    return None if compression and kind in ("parquet", "arrow") else kind


def kind_of(path: Path) -> Kind:
    """Returns the kind as which a file is read: text where the suffix says nothing.

    Raises:
        DataError: a table that is compressed as a whole.
    """
    suffix, compression = suffixes(path)
    kind = KINDS.get(suffix, "text")
    if compression and kind in ("parquet", "arrow"):
        raise DataError(f"{path}: a {suffix} file cannot be read through {compression}; unpack it")
    return kind


def is_compressed(path: Path) -> bool:
    """Returns whether the name ends in a suffix of compression."""
    return suffixes(path)[1] != ""


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, decompressed.

    Raises:
        DataError: it is a git-lfs pointer.
        OSError: it cannot be opened.
    """
    refuse_pointer(path, DataError)
    opener = _OPENERS.get(suffixes(path)[1])
    file: BinaryIO = path.open("rb") if opener is None else opener(path)
    return file
