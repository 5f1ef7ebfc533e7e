"""Text documents from local files: plain text, JSON lines and Parquet, each checked as it is read.

Text stays byte-exact: no newline is translated and nothing is stripped but a UTF-8 byte order mark.
A plain text file is read in blocks, so that it may be larger than memory; a row of the other kinds
is held whole.
"""

import codecs
import gzip
import json
import logging
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from textdiff.data.documents import Block
from textdiff.errors import DataError

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")

_BOM = b"\xef\xbb\xbf"
_READ_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 28  # a line is held three times: as bytes, as JSON and as its text
_ONE_OBJECT = 'every line has to be an object such as {"text": "..."}'
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)

_log = logging.getLogger(__name__)


def is_text_file(path: Path) -> bool:
    """Whether the name ends in a suffix that `read_file` knows."""
    return path.name.lower().endswith(SUFFIXES)


def read_texts(paths: Sequence[str], text_column: str = "text") -> list[str]:
    """Reads local files and folders into memory, for scoring.

    Args:
        paths: files (`SUFFIXES`) or folders of them, read in the order given.
        text_column: the JSON key or Parquet column that holds the text.

    Returns:
        The documents: one per text file, JSON line or Parquet row.

    Raises:
        DataError: a path is missing, or holds no usable text; the message names the place.
    """
    found = [file for path in paths for file in text_files(Path(path))]
    texts: list[str] = []
    parts: list[str] = []
    for file in found:
        for text, last in read_file(file, text_column):
            parts.append(text)
            if last:
                texts.append("".join(parts))
                parts = []
    return texts


def text_files(path: Path) -> list[Path]:
    """The file of this path, or all text files below a folder in sorted order.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path")
    if path.is_dir():
        return _files_below(path)
    if not is_text_file(path):
        raise DataError(f"{path}: unknown kind of file; textdiff reads {', '.join(SUFFIXES)}")
    return [path]


def read_file(path: Path, text_column: str) -> Iterator[Block]:
    """Yields the blocks of one file's documents; an empty string in a row is no document.

    Raises:
        DataError: see `read_texts`.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        blocks = _rows(_read_parquet(path, text_column))
    elif ".jsonl" in name:
        blocks = _rows(_read_jsonl(path, text_column))
    else:
        blocks = _read_plain(path)
    blank = True
    for block in blocks:
        blank = blank and not block.text.strip()
        yield block
    if blank:
        raise no_text(str(path))


def no_text(where: str) -> DataError:
    """The error for a file or a data set without any text."""
    return DataError(
        f"{where}: holds no text (it is empty or only white space); give one that holds some"
    )


def _rows(texts: Iterator[str]) -> Iterator[Block]:
    return (Block(text, True) for text in texts if text)


def _files_below(folder: Path) -> list[Path]:
    relative = [path.relative_to(folder) for path in folder.rglob("*") if is_text_file(path)]
    visible = [path for path in relative if not any(part[0] == "." for part in path.parts)]
    found = []
    for path in sorted(visible, key=lambda path: path.parts):
        if not (folder / path).is_file():
            continue
        if (folder / path).stat().st_size == 0:
            # One empty file among thousands is an accident of preparation, not of this run.
            _log.warning("%s is empty and was skipped", folder / path)
            continue
        found.append(folder / path)
    if not found:
        raise DataError(f"{folder}: no text files in this folder; expected {', '.join(SUFFIXES)}")
    return found


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.lower().endswith(".xz"):
        return lzma.open(path, "rb")
    return path.open("rb")


def _read_plain(path: Path) -> Iterator[Block]:
    held = ""  # a block behind, to know which one is the last
    try:
        with _open(path) as file:
            for text in _decoded(file, path):
                if held:
                    yield Block(held, False)
                held = text
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if held:
        yield Block(held, True)


def _decoded(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[str]:
    """Yields a file's text, never the empty string; `rest` is the beginning of a character."""
    rest, offset = b"", 0
    while data := file.read(_READ_BYTES):
        data = rest + data
        _refuse_zero(data, path, offset)
        if offset == 0 and data.startswith(_BOM):
            data, offset = data[len(_BOM) :], len(_BOM)
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start) from None
        rest, offset = data[used:], offset + used
        if text:
            yield text
    if rest:
        raise _not_utf8(path, offset)


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    for where, row in json_rows(path):
        if column not in row:
            raise missing_column(where, column, row)
        yield checked_text(row[column], where, column)


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a JSON lines file, each with its place for messages.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; with the line's number.
    """
    offset = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file, path), start=1):
                text = _decode(line, path, offset)
                offset += len(line)
                if text.strip():
                    yield f"{path}, line {number}", _json_object(text, f"{path}, line {number}")
    except _DAMAGED as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _lines(file: IO[bytes] | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    number = 0
    while line := file.readline(_LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > _LONGEST_LINE_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {_LONGEST_LINE_BYTES >> 20} MB; give so long "
                "a text as a .txt file, which is read in blocks"
            )
        yield line


def _decode(data: bytes, path: Path, start: int) -> str:
    """Decodes UTF-8; `start` is the offset of `data` in the (decompressed) file."""
    _refuse_zero(data, path, start)
    if start == 0 and data.startswith(_BOM):
        data, start = data[len(_BOM) :], len(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, start + error.start) from None


def _refuse_zero(data: bytes, path: Path, start: int) -> None:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{path}: not a text file (zero byte at offset {start + zero}); convert it to UTF-8"
        )


def _not_utf8(path: Path, byte: int) -> DataError:
    return DataError(f"{path}: not valid UTF-8 at byte {byte}; convert the file to UTF-8")


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); {_ONE_OBJECT}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object; {_ONE_OBJECT}")
    return row


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise missing_column(str(path), column, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    yield checked_text(text, f"{path}, row {row}", column)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def missing_column(where: str, column: str, present: Sequence[str] | Any) -> DataError:
    """The error for a column or key that is not there, listing those that are."""
    names = ", ".join(map(str, present)) or "none"
    return DataError(f"{where}: no column {column!r}; set text_column to one of: {names}")


def checked_text(value: object, where: str, column: str) -> str:
    """Returns `value` if it is a string.

    Raises:
        DataError: it is something else.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} holds {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {column!r} holds half of a surrogate pair, no text") from None
    return value
