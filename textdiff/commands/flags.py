"""Flags read by tyro; what it refuses is said in one sentence.

Tyro draws a box of many lines around a refusal. Its words are taken out of the box: that is what it
shows everybody, while its hooks for errors are private and change.
"""

import difflib
import functools
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from textdiff.errors import ConfigError

T = TypeVar("T")

_WORDS = {"INT": "a whole number", "FLOAT": "a number", "STR": "a text", "PATH": "a path"}


def parse(
    target: Callable[..., T],
    prog: str,
    arguments: Sequence[str],
    markers: Sequence[Any],
    default: T | None = None,
) -> T:
    """What tyro makes of a class and a command line.

    Args:
        target: a class, or a function.
        prog: the command as the user typed it; what follows ` [` is only for its usage line.
        arguments: its flags and values.
        markers: of `tyro.conf`.
        default: the values that flags change.

    Raises:
        ConfigError: an unknown flag, a value that cannot be read, or one that is missing.
        SystemExit: by `--help` (0).
    """
    import tyro

    read: Callable[..., T] = tyro.cli
    given = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return read(target, prog=prog, args=list(arguments), config=tuple(markers), **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        command, _, usage = prog.partition(" [")
        own = [*_options(target), *re.findall(r"--[\w-]+", usage)]
        sentence = explain(said.getvalue(), own)
        more = "" if sentence.endswith("?") else f"; see {command} --help"
        raise ConfigError(sentence + more) from None


def _options(target: Any) -> Iterator[str]:
    """Yield the options that a function takes, those of its groups included."""
    for name, hint in get_type_hints(target, include_extras=True).items():
        inner, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if is_dataclass(inner):
            yield from _options(inner)
        elif name != "return" and not any("Positional" in repr(mark) for mark in marks):
            own = [mark.name for mark in marks if getattr(mark, "name", None)]
            yield "--" + (own or [name])[0].replace("_", "-")


def deferred(function: Callable[..., T]) -> Callable[..., Callable[[], T]]:
    """The same signature for tyro; calling it only notes the values, for a call afterwards."""

    @functools.wraps(function)
    def note(*values: Any, **named: Any) -> Callable[[], T]:
        checked = {name: _checked(name, value) for name, value in named.items()}
        return functools.partial(function, *map(functools.partial(_checked, ""), values), **checked)

    return note


def _checked(name: str, value: Any) -> Any:
    """Return a flag's value: paths with the home folder for `~`, groups of flags likewise.

    Raises:
        ConfigError: a number that is not finite.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{name.replace('_', '-')} {value}: give a finite number")
    if isinstance(value, Path):
        return _expanded(name, value)
    if is_dataclass(value) and not isinstance(value, type):
        found = {f.name: _checked(f.name, getattr(value, f.name)) for f in fields(value)}
        return replace(value, **found)
    if isinstance(value, tuple):
        return tuple(_checked(name, item) for item in value)
    return value


def _expanded(name: str, path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"--{name.replace('_', '-')} {path}: there is no such user; write ./{path} if that is "
            "a name"
        ) from None


def explain(box: str, own: Sequence[str] = ()) -> str:
    """One sentence for a box of tyro's, without its end.

    Args:
        box: what tyro printed.
        own: options of the command.
    """
    parts = _paragraphs(box)
    first = parts[0] or "the command line cannot be read"
    if found := re.match(r"Unrecognized options: (.+)", first):
        return _unknown(found[1].split(", ")[0], own)
    if found := re.match(r"Error parsing (\S+): (.*)", first):
        return _unreadable(found[1], found[2], " ".join(parts[1:]))
    if found := re.match(r"Missing value for argument '([^']+)'", first):
        return f"{found[1].split('/')[0]} needs a value"
    if found := re.match(r"invalid choice (.*) for argument '([^']+)'\. .*?\((.*)\)", first):
        takes = " or ".join(re.findall(r"'([^']*)'", found[3]))
        return f"{found[2].split('/')[0]}: {found[1]} is not {takes}"
    if found := re.match(r"Missing from .*?: (\S+) (.*)", first):
        meaning = found[2].split(" (required)")[0].rstrip(".")
        return f"{found[1]} is missing: {meaning}" if meaning else f"{found[1]} is missing"
    return first.rstrip(".")


def _paragraphs(box: str) -> list[str]:
    """The texts between a box's rules, each on one line, without the title.

    Where the terminal has no UTF-8, the title stands above a rule of hyphens.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in box.splitlines()]
    inner = " ".join(line.strip("│ ") for line in lines if line[:1] not in ("╭", "╰"))
    parts = [" ".join(part.split()) for part in re.split(r"─{5,}|-{5,}", inner)]
    return parts[1:] if len(parts) > 1 and "╭" not in box else parts


def _unknown(word: str, known: Sequence[str]) -> str:
    """An unknown word, and what it may have been meant to be."""
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    name = word.split("=")[0]
    names = [option.removeprefix("--") for option in known]
    typed = name.lstrip("-").replace("_", "-")
    best = difflib.get_close_matches(typed, names, n=1, cutoff=0.6)
    return f"unknown option {name}" + (f"; did you mean --{best[0]}?" if best else "")


def _unreadable(name: str, reason: str, help_text: str) -> str:
    """A value that is none of what an option takes."""
    option = name.split("/")[0]
    quoted = re.findall(r"\['(.*?)'\]|'([^']*)'$", reason.rstrip("."))
    value = "".join(quoted[0]) if quoted else ""
    kinds = re.search(rf"{re.escape(option)} (\S+)", help_text)
    if not kinds:
        return f"{option}: {reason.rstrip('.')}"
    takes = [_WORDS.get(kind, kind) for kind in re.split(r"[|,]", re.sub(r"[{}]", "", kinds[1]))]
    given = f"{value!r} is not" if value else "it has to be"
    return f"{option}: {given} {' or '.join(takes)}"
