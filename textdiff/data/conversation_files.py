"""Files whose rows are conversations, recognised by their columns."""

from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq

from textdiff.data.conversation_rows import CONVERSATIONS, holds_conversation
from textdiff.data.formats import kind_of_file
from textdiff.data.json_rows import holds_column
from textdiff.data.paths import find_files
from textdiff.errors import DataError


def hold_conversations(names: Sequence[str], text_column: str) -> bool:
    """Return whether the rows of files are conversations, and have no text of their own.

    The first row of the first file decides. What cannot be read is refused by its reader.

    Args:
        names: paths and patterns; `-` is standard input, which is plain text.
        text_column: the column of texts.
    """
    if not names or names[0] == "-":
        return False
    with suppress(DataError, OSError, pa.ArrowException):
        first = find_files(str(names[0])).paths[0]
        kind = kind_of_file(first)
        if kind in ("lines", "json"):
            return holds_column(first, CONVERSATIONS) and not holds_column(first, text_column)
        if kind == "parquet":
            columns = dict.fromkeys(pq.read_schema(first).names)
            return holds_conversation(columns) and text_column not in columns
    return False
