"""Files of text: kinds by the suffixes of their names, their bytes, and those as UTF-8 text.

A compression suffix is taken off first; of what is left the last suffix decides alone:
`notes.jsonl.txt` is plain text, `notes.txt.jsonl` holds JSON lines.

Text stays byte-exact but for a byte order mark at its beginning. Readers of the standard library
do not say at which byte a file stops being UTF-8, which users need to repair it.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from textdiff.data.document_stream import TextBlock
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
TABLES: tuple[Kind, ...] = ("parquet", "arrow")

_SPLITS = "dataset_dict.json"  # of datasets: a folder that holds a saved dataset for each split
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_READ_BYTES = 1 << 20


def _open_by_pyarrow(codec: str, path: Path) -> Any:
    """Open a file that the standard library of Python 3.11 cannot decompress."""
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), codec)
    return io.BufferedReader(stream)


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: path.open("rb"),
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": partial(_open_by_pyarrow, "zstd"),
    ".lz4": partial(_open_by_pyarrow, "lz4"),
}

READABLE = (
    f"{', '.join(KINDS)}, all but the last two also with {', '.join(filter(None, _OPENERS))} after "
    "them"
)
"""The suffixes as the end of a sentence."""


def suffixes(path: Path) -> tuple[str, str]:
    """Return the suffix that decides, and that of a compression; the empty string: none."""
    name, compression = Path(path.name.lower()), ""
    if name.suffix in _OPENERS:
        name, compression = Path(name.stem), name.suffix
    return name.suffix, compression


def known_kind(path: Path) -> Kind | None:
    """Return the kind of file that a name promises; None: its suffix is not one of text."""
    suffix, compression = suffixes(path)
    kind = KINDS.get(suffix)
    return None if compression and kind in TABLES else kind


def kind_of_file(path: Path) -> Kind:
    """Return the kind as which a file is read: text where the suffix says nothing.

    Raises:
        DataError: a table that is compressed as a whole.
    """
    suffix, compression = suffixes(path)
    kind = KINDS.get(suffix, "text")
    if compression and kind in TABLES:
        raise DataError(
            f"{path}: a {suffix} file cannot be read through {compression}; unpack it",
            code="compressed_table",
        )
    return kind


def is_saved(folder: Path) -> bool:
    """Return whether a folder is one that `save_to_disk` of `datasets` writes."""
    names = ("state.json", "dataset_info.json")
    return (folder / _SPLITS).is_file() or all((folder / name).is_file() for name in names)


def saved_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a saved dataset, in its order.

    Raises:
        DataError: it holds several splits, or cannot be read.
    """
    if (folder / _SPLITS).is_file():
        raise DataError(
            f"{folder}: holds splits of a dataset; name the folder of one of them", code="splits"
        )
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return tuple(folder / file["filename"] for file in state["_data_files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{folder}: not a readable save_to_disk folder") from None


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        DataError: it is a git-lfs pointer, or cannot be read to where the caller reads it.
    """
    refuse_pointer(path, DataError)
    try:
        with _OPENERS[suffixes(path)[1]](path) as file:
            yield file
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})", code="unreadable") from None


def decoded(file: BinaryIO, where: str) -> Iterator[str]:
    """Yield a file's text in blocks, never the empty string.

    Args:
        file: the bytes.
        where: their name for messages.

    Raises:
        DataError: a zero byte, or bytes that are not UTF-8.
        OSError: the file cannot be read.
    """
    rest, offset = b"", 0  # `rest` is the beginning of a character
    data = file.read(len(codecs.BOM_UTF8))
    if data == codecs.BOM_UTF8:
        data, offset = file.read(_READ_BYTES), len(data)
    while data:
        data = rest + data
        _refuse_zero(data, where, offset)
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start) from None
        rest, offset = data[used:], offset + used
        if text:
            yield text
        data = file.read(_READ_BYTES)
    if rest:
        raise _not_utf8(where, offset)


def decode(data: bytes, where: str, start: int = 0) -> str:
    """Return bytes as text; `start` is their offset in the (decompressed) file.

    Raises:
        DataError: see `decoded`.
    """
    _refuse_zero(data, where, start)
    if start == 0 and data.startswith(codecs.BOM_UTF8):
        start = len(codecs.BOM_UTF8)
        data = data[start:]
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, start + error.start) from None


def _refuse_zero(data: bytes, where: str, start: int) -> None:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{where}: not a text file (zero byte at offset {start + zero}); convert it to UTF-8",
            code="zero_byte",
        )


def _not_utf8(where: str, byte: int) -> DataError:
    return DataError(
        f"{where}: not valid UTF-8 at byte {byte}; convert the file to UTF-8", code="not_utf8"
    )


def read_plain_file(path: Path) -> Iterator[TextBlock]:
    """Yield the blocks of a text file, which is one document; see `read_plain`.

    Raises:
        DataError: it cannot be read, or is not UTF-8 text.
    """
    with opened(path) as file:
        yield from read_plain(file, str(path))


def read_plain(file: BinaryIO, where: str) -> Iterator[TextBlock]:
    """Yield the blocks of a text that is one document; of white space alone, none.

    Args:
        file: the bytes.
        where: their name for messages.

    Raises:
        DataError: they are not UTF-8 text.
        OSError: they cannot be read.
    """
    held, blank = "", True  # one block is held, to know which one is the last
    spaces: list[str] = []
    for text in decoded(file, where):
        if blank and text.isspace():
            spaces.append(text)
            continue
        if blank:
            text, blank = "".join([*spaces, text]), False
        if held:
            yield TextBlock(held, False)
        held = text
    if held:
        yield TextBlock(held, True)
