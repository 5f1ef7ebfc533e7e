"""Bytes as UTF-8 text, a block at a time and byte-exact but for a leading byte order mark."""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from textdiff.errors import DataError

_BOM = codecs.BOM_UTF8
_READ_BYTES = 1 << 20


def decoded(file: BinaryIO, where: str) -> Iterator[str]:
    """Yields a file's text, never the empty string.

    Args:
        file: the bytes.
        where: their name for messages.

    Raises:
        DataError: a zero byte, or bytes that are not UTF-8.
        OSError: the file cannot be read.
    """
    rest, offset = b"", 0  # `rest` is the beginning of a character
    while data := file.read(_READ_BYTES):
        data = rest + data
        _refuse_zero(data, where, offset)
        if offset == 0 and len(data) < len(_BOM) and _BOM.startswith(data):
            rest = data  # the rest of the mark is still to come
            continue
        if offset == 0 and data.startswith(_BOM):
            data, offset = data[len(_BOM) :], len(_BOM)
        try:
            text, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as error:
            raise _not_utf8(where, offset + error.start) from None
        rest, offset = data[used:], offset + used
        if text:
            yield text
    if rest:
        raise _not_utf8(where, offset)


def decode(data: bytes, where: str, start: int = 0) -> str:
    """Returns bytes as text; `start` is their offset in the (decompressed) file.

    Raises:
        DataError: see `decoded`.
    """
    _refuse_zero(data, where, start)
    if start == 0 and data.startswith(_BOM):
        data, start = data[len(_BOM) :], len(_BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, start + error.start) from None


def _refuse_zero(data: bytes, where: str, start: int) -> None:
    zero = data.find(b"\0")
    if zero >= 0:
        raise DataError(
            f"{where}: not a text file (zero byte at offset {start + zero}); convert it to UTF-8"
        )


def _not_utf8(where: str, byte: int) -> DataError:
    return DataError(f"{where}: not valid UTF-8 at byte {byte}; convert the file to UTF-8")
