"""The errors that a user caused and can repair: one sentence with what, where and what to do.

The command line prints the message alone and exits with `exit_code`; a traceback is for bugs.
"""

import difflib
from collections.abc import Iterable


class TextDiffError(Exception):
    """Base of every error whose message is meant for the user.

    Args:
        message: one sentence.
        code: a short name of the reason that stays when the sentence is reworded, such as
            "unknown_rule"; programs and tests compare it.
    """

    exit_code = 1

    def __init__(self, message: str = "", *, code: str | None = None):
        super().__init__(message)
        self.code = code


class ConfigError(TextDiffError):
    """A config file, a flag or an argument is wrong."""

    exit_code = 2


class DataError(TextDiffError):
    """A text, a corpus or a tokenizer cannot be used."""


class CheckpointError(TextDiffError):
    """An export directory or a training checkpoint cannot be used."""


class LostProcessError(TextDiffError):
    """Another process of the run is gone; each that is left says so, whoever is the first."""


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:")[:200] if lines else type(error).__name__


def overflow_advice(dtype: object) -> str:
    """Return what to do about outputs that are not finite, as the end of a sentence.

    bfloat16 reaches as far as float32 does: only float16 overflows earlier.
    """
    advice = "its weights are damaged, use another checkpoint"
    overflows = str(dtype).removeprefix("torch.") == "float16"
    return f"{advice}; or float16 overflows, use float32" if overflows else advice


def closest(name: str, known: Iterable[str]) -> str:
    """Return the nearest known name, or all of them, as the end of a sentence."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"


def unknown(noun: str, name: object, known: Iterable[str]) -> ConfigError:
    """Return the error of a name that is not among those of a registry, which it lists."""
    names = list(known)
    near = closest(str(name), names)
    hint = near if near.startswith("there are") else f"{near} there are: {', '.join(names)}"
    return ConfigError(f"unknown {noun} {name!r}; {hint}", code=f"unknown_{noun}".replace(" ", "_"))
