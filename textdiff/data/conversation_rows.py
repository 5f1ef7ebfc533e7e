"""Rows that hold conversations, checked as they are read, each as one JSON text.

A row has one of the sets of columns below. Its JSON text is a document like any other: it is held
out by its content, counted and hashed. What is not part of the conversation is left out of it.
"""

import json
from collections.abc import Iterable
from typing import Any

from textdiff.data.conversations import Message, check_answered, checked_messages
from textdiff.data.document_stream import checked_text, missing_column, text_of
from textdiff.errors import DataError

CONVERSATIONS = "messages, prompt and completion, or question and answer"
"""Stands where the name of a text column does: the rows are conversations."""

COLUMN_SETS = (("messages",), ("prompt", "completion"), ("question", "answer"))


def row_text(row: object, where: str, column: str) -> str:
    """Return the text of a row, or its conversation; see `text_of`.

    Raises:
        DataError: it has none.
    """
    if column == CONVERSATIONS:
        return conversation_text(row, where)
    return text_of(row, where, column)


def wanted_columns(present: Iterable[str], where: str, column: str) -> list[str]:
    """Return the columns of a table that are to be read: one, or all that conversations may have.

    Raises:
        DataError: there is none.
    """
    names = list(present)
    if column != CONVERSATIONS:
        if column not in names:
            raise missing_column(where, column, names)
        return [column]
    chosen = [name for columns in COLUMN_SETS for name in columns if name in names]
    if not chosen:
        raise _no_columns(where, names)
    return chosen


def holds(row: object, column: str) -> bool:
    """Return whether a row has a text column, or those of a conversation."""
    sets = COLUMN_SETS if column == CONVERSATIONS else ((column,),)
    return isinstance(row, dict) and any(row.keys() >= set(columns) for columns in sets)


def conversation_text(row: object, where: str) -> str:
    """Return the conversation of a row as a JSON text.

    Raises:
        DataError: none of the sets of columns, several of them, or a wrong conversation.
    """
    if not isinstance(row, dict):
        raise DataError(f'{where}: not an object such as {{"messages": [...]}}', code="not_object")
    filled = {name for name, value in row.items() if value is not None}
    complete = [columns for columns in COLUMN_SETS if filled.issuperset(columns)]
    if not complete:
        raise _no_columns(where, row)
    if len(complete) > 1:
        sets = " and ".join("/".join(columns) for columns in complete)
        raise DataError(
            f"{where}: has {sets}, which exclude each other; keep one of them",
            code="mixed_columns",
        )
    chosen = {name: row[name] for name in complete[0]}
    messages_of(chosen, where)
    return json.dumps(chosen, ensure_ascii=False)


def _no_columns(where: str, present: Iterable[str]) -> DataError:
    return DataError(
        f"{where}: no conversation; it needs {CONVERSATIONS}, and has "
        f"{', '.join(present) or 'nothing'}",
        code="no_conversation_columns",
    )


def messages_of(row: dict[str, Any], where: str) -> list[Message]:
    """Return the messages of a row; a prompt is one of a user, its answer one of the assistant.

    Raises:
        DataError: messages that are not in order, or an answer that is blank.
    """
    if "messages" in row:
        messages = checked_messages(row["messages"], where)
        check_answered(messages, where)
        return messages
    (first, prompt), (second, answer) = row.items()
    texts = checked_text(prompt, where, first), checked_text(answer, where, second)
    if not answer.strip():
        raise DataError(
            f"{where}: its {second} is blank; write it, or leave the row out", code="empty_answer"
        )
    return [Message("user", texts[0]), Message("assistant", texts[1])]
