"""What the knobs of a rule may be set to; each check stops with a sentence that names the knob."""

import math
from collections.abc import Iterable

from textdiff.errors import ConfigError


def check_switch(name: str, value: object) -> None:
    """A knob that is on or off.

    Raises:
        ConfigError: neither true nor false.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} {value!r}: give true or false")


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """A finite number within limits, which are included.

    Raises:
        ConfigError: out of range, or no number.
    """
    wanted = f"{low:g} or more" if high == math.inf else f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} {value!r}: give {wanted}")
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"{name} {value}: give {wanted}")


def check_count(name: str, value: object, low: int = 0) -> None:
    """A whole number.

    Raises:
        ConfigError: too small, or no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} {value!r}: give a whole number, {low} or more")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """One of some words.

    Raises:
        ConfigError: another one.
    """
    if value not in list(choices):
        raise ConfigError(f"{name} {value!r}: give one of {', '.join(choices)}")
