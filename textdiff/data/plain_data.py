"""YAML and JSON as plain data.

What a user writes by hand has no key twice: parsers keep the last of two equal keys silently, so
that a whole section of a config is lost. Rows of corpora are read as everybody's parser reads them.
"""

import json
import math
from pathlib import Path
from typing import Any

import yaml

from textdiff.data.formats import decode
from textdiff.errors import ConfigError, DataError


def read_yaml(path: Path, name: str) -> Any:
    """Parse a YAML file.

    Args:
        path: the file.
        name: what a refusal begins with.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or YAML, or a mapping has a key twice.
    """
    try:
        text = decode(path.read_bytes(), name)
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; check the path", code="no_file") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a folder, not a file", code="no_file") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error})", code="unreadable") from None
    except DataError as error:
        raise ConfigError(str(error), code=error.code) from None
    return parse_yaml(text, name)


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        where: what a refusal begins with, such as the file's name.

    Raises:
        ConfigError: it is not YAML, or a mapping has a key twice.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_duplicates(node, where, (), set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    except (ValueError, RecursionError) as error:  # an impossible date, 1,000 nested brackets
        raise ConfigError(f"{where}: not valid YAML ({error})") from None


def _refuse_duplicates(node: yaml.Node, where: str, path: tuple[str, ...], seen: set[int]) -> None:
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _refuse_duplicates(item, where, (*path, str(index)), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        line = key.start_mark.line + 1
        if (key.tag, name) in lines and isinstance(key, yaml.ScalarNode):
            raise ConfigError(
                f"{where}: `{'.'.join((*path, name))}` stands on line {lines[key.tag, name]} and "
                f"again on line {line}; keep one of them"
            )
        lines[key.tag, name] = line
        _refuse_duplicates(value, where, (*path, name), seen)


def parse_json(text: str) -> Any:
    """Parse strict JSON: no key twice, no NaN or infinity, no integer that is too long.

    Raises:
        ValueError: it is not strict JSON; the message says why.
    """
    return json.loads(
        text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_integer
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} stands twice; keep one of them")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python converts no longer ones, in either direction
        raise ValueError(
            f"an integer of {len(digits)} digits, and 4300 are allowed; write it as a string"
        ) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def parse_json_row(text: str) -> Any:
    """Parse JSON as corpora have it; an integer that is too long for Python becomes infinite.

    Such an integer is valid JSON and mostly in a key that is not read.

    Raises:
        json.JSONDecodeError: the text is not valid JSON.
        RecursionError: it is nested too deeply.
    """
    return _LENIENT.decode(text)


def parse_json_prefix(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, as `parse_json_row` does, and its end.

    Raises:
        json.JSONDecodeError: there is not a valid value.
        RecursionError: it is nested too deeply.
    """
    return _LENIENT.raw_decode(text, start)


def _infinite_if_long(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python refuses to convert integers of more than 4300 digits
        return -math.inf if digits.startswith("-") else math.inf


_LENIENT = json.JSONDecoder(parse_int=_infinite_if_long)
