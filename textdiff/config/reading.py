"""Reading and writing a config: YAML, command-line flags over it, errors that name the key.

`load` reads YAML and applies flags; `to_yaml` writes the resolved config back. Flags are
`--section.key VALUE`, `--section.key=VALUE` or `section.key=VALUE`. They are read as plain data by
the type of their key and merged into what the file holds. The schema judges the result as a whole,
so flags may complete what the file leaves inconsistent.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from textdiff.config.keys import at, explain, is_list, keys, leaves, section_kind, variants
from textdiff.config.schema import Config
from textdiff.data.plain_data import parse_json, parse_yaml, read_yaml
from textdiff.errors import ConfigError
from textdiff.section import Section


def load(
    path: str | Path, flags: Sequence[str] = (), prog: str = "textdiff train CONFIG"
) -> Config:
    """Read a YAML file and apply flags over it.

    Args:
        path: the YAML file; absent sections and keys take their defaults.
        flags: `--section.key value` pairs, or `section.key=value`.
        prog: the command, for what a refusal recommends; its own options follow ` [`.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is wrong.
    """
    raw = _read(Path(path).expanduser())
    command, _, usage = prog.partition(" [")
    try:
        given = read_flags(flags, own=re.findall(r"--[\w-]+", usage))
    except ConfigError as error:
        more = "" if str(error).endswith("?") else f"; see {command} --help"
        raise ConfigError(f"{error}{more}") from None
    merge(raw, given)
    return validate(raw, str(path), {flag.path: flag.name for flag in given})


def validate(
    raw: Mapping[str, Any],
    where: str = "config",
    flags: Mapping[tuple[str, ...], str] | None = None,
) -> Config:
    """Check plain data against the schema.

    Args:
        raw: sections and keys.
        where: what holds them.
        flags: which flag set a key, by the key's path.

    Raises:
        ConfigError: with one clause for each wrong key.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(explain(error, raw, where, flags or {})) from None


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: no such config file; see configs/ for complete ones")
    raw = read_yaml(path, str(path))
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `train:`, found {raw!r:.60}")
    return raw


_ASSIGNMENT = re.compile(rf"({'|'.join(Config.model_fields)})(\.[\w-]+)*=", re.ASCII)
_NOTHING = ("null", "Null", "NULL", "none", "None")


@dataclass(frozen=True)
class Flag:
    """A key and its value.

    Attributes:
        name: the flag as the user wrote it, without its value.
        path: names of sections and key.
        value: plain data.
    """

    name: str
    path: tuple[str, ...]
    value: Any


def read_flags(words: Sequence[str], own: Sequence[str] = ()) -> list[Flag]:
    """Read the flags of a command line.

    Args:
        words: the command line after the config's path.
        own: options of the command itself, for suggestions.

    Raises:
        ConfigError: an unknown flag, one without a value, or a word that belongs to none.
    """
    flags, index = [], 0
    while index < len(words):
        word = words[index]
        if not (word.startswith("-") or _ASSIGNMENT.match(word)):
            raise ConfigError(f"unexpected argument {word!r}")
        name, equals, value = word.partition("=")
        path = tuple(name.removeprefix("--").replace("-", "_").split("."))
        if at(path) is None:
            raise ConfigError(_unknown(name, own))
        values = [value] if equals else _values(words[index + 1 :], path)
        if not values:
            raise ConfigError(f"{name} needs a value; write {name}=VALUE if it begins with --")
        flags.append(Flag(name, path, _plain(name, at(path), values)))
        index += 1 if equals else 1 + len(values)
    return flags


def _values(words: Sequence[str], path: tuple[str, ...]) -> list[str]:
    """Return the words that are a flag's value: one, or several where a list is wanted."""
    if not words or words[0].startswith("--"):
        return []
    if not is_list(at(path)):
        return [words[0]]
    rest = (n for n, word in enumerate(words) if word.startswith("--") or _ASSIGNMENT.match(word))
    return list(words[: next(rest, len(words))])


def _plain(name: str, annotation: Any, words: Sequence[str]) -> Any:
    """Return the value that a key of some type is given by words: a text stays as it is."""
    if len(words) > 1:
        return [_nothing(word) for word in words]
    (word,) = words
    types = leaves(annotation)
    if word[:1] in ("[", "{") and (is_list(annotation) or variants(annotation)):
        return _structure(name, word)
    if type(None) in types or all(get_origin(leaf) is tuple for leaf in types):
        return _nothing(word)
    return word


def _nothing(word: str) -> str | None:
    return None if word in _NOTHING else word


def _structure(name: str, word: str) -> Any:
    """Return the list or section that a word holds, as JSON or as YAML."""
    try:
        return parse_json(word)
    except ValueError as error:
        if "stands twice" in str(error):
            raise ConfigError(f"{name}: {error}") from None
    return parse_yaml(word, name)


def merge(raw: dict[str, Any], flags: Sequence[Flag]) -> None:
    """Write flags into a config's plain data: whole sections and kinds first.

    Raises:
        ConfigError: a flag leads through a value, or to an item that a list does not have.
    """
    for flag in sorted(flags, key=lambda flag: not _structural(flag)):
        _assign(raw, flag)


def _structural(flag: Flag) -> bool:
    return flag.path[-1] == "kind" or isinstance(flag.value, dict | list)


def _assign(raw: dict[str, Any], flag: Flag) -> None:
    node: Any = raw
    for depth, name in enumerate(flag.path[:-1]):
        if isinstance(node, list):
            node = node[_index(flag, depth, len(node))]
        else:
            if node.get(name) is None:
                node[name] = _default(flag.path[: depth + 1], flag.path[-1] != "kind")
            node = node[name]
        if not isinstance(node, dict | list):
            inside = ".".join(flag.path[: depth + 1])
            raise ConfigError(f"{flag.name}: `{inside}` holds a value, not a section")
    if isinstance(node, list):
        node[_index(flag, len(flag.path) - 1, len(node))] = flag.value
    else:
        node[flag.path[-1]] = flag.value


def _index(flag: Flag, depth: int, count: int) -> int:
    index = int(flag.path[depth]) if flag.path[depth].isdecimal() else count
    if index >= count:
        inside = ".".join(flag.path[:depth])
        held = {0: "no entry", 1: "one entry, 0"}.get(count, f"entries 0 to {count - 1}")
        raise ConfigError(f"{flag.name}: `{inside}` has {held}")
    return index


def _default(path: tuple[str, ...], with_kind: bool) -> Any:
    """Return what a section or list holds where the file does not say, as a flag's ground."""
    field = variants(at(path[:-1]))[0].model_fields.get(path[-1])
    default = PydanticUndefined if field is None else field.default
    if isinstance(default, tuple):
        return [item.model_dump(exclude_unset=True) for item in default]
    kind = section_kind(type(default)) if isinstance(default, Section) else None
    return {"kind": kind} if kind and with_kind else {}


def _unknown(name: str, own: Sequence[str]) -> str:
    """Say that a flag is unknown, and what it may have been meant to be."""
    typed = "--" + name.lstrip("-").replace("_", "-")
    index = re.search(r"\.(\d+)\.", typed)
    known = ["--" + ".".join(path).replace("_", "-") for path in keys()]
    if index is not None:
        known = [key.replace(".0.", index[0]) for key in known]
    near = difflib.get_close_matches(typed, own, n=1)
    if not near and "." not in typed:  # the section is missing
        last = {key.rpartition(".")[2] for key in known}
        close = difflib.get_close_matches(typed.lstrip("-"), last, n=1, cutoff=0.8)
        near = [key for key in known if close and key.rpartition(".")[2] == close[0]][:3]
    near = near or difflib.get_close_matches(typed, known, n=1)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown option {name}{hint}"
