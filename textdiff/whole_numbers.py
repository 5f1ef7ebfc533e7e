"""Whole numbers of Python, NumPy and torch alike."""

import operator
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
        raise ConfigError(f"{name} {value!r:.60}: give a whole number") from None
