"""Checks of the values that callers hand over: whole numbers and texts."""

import operator
from collections.abc import Iterable
from os import PathLike
from typing import Any

from textdiff.errors import ConfigError


def whole_number(name: str, value: Any) -> int:
    """Return a value as a Python integer.

    Args:
        name: of the argument.
        value: an integer of any library, or a float without a fraction.

    Raises:
        ConfigError: it is not a whole number.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        if isinstance(value, float) and value.is_integer():
            return int(value)
        return operator.index(value)
    except TypeError:
        message = f"{name} {value!r:.60}: give a whole number"
        raise ConfigError(message, code="whole_number") from None


def checked_texts(texts: Any, what: str) -> list[str]:
    """Return texts as a list.

    Args:
        texts: the texts, in any iterable but a string or a mapping.
        what: their name for messages.

    Raises:
        ConfigError: something else, or one of them is not a string.
    """
    if isinstance(texts, str):
        message = f"{what} is a single string; give a list of texts: [text]"
        raise ConfigError(message, code="not_texts")
    if isinstance(texts, bytes | bytearray | dict) or not isinstance(texts, Iterable):
        raise ConfigError(f"{what} is {_named(texts)}; give a list of strings", code="not_texts")
    return [checked_string(text, f"{what}[{number}]") for number, text in enumerate(texts)]


def checked_string(value: object, what: str) -> str:
    """Return `value` if it is a string.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(value, str):
        message = f"{what} is {_named(value)}, not a string{_advice(value)}"
        raise ConfigError(message, code="not_texts")
    return value


def one_or_more(texts: Any, what: str) -> list[str]:
    """Return a text, or several, as a list.

    Raises:
        ConfigError: see `checked_texts`.
    """
    return [texts] if isinstance(texts, str) else checked_texts(texts, what)


def _named(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _advice(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return "; decode it"
    return "; read the file first" if isinstance(value, PathLike) else ""
