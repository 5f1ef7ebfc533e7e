"""YAML and JSON as plain data, in which no key stands twice.

Parsers keep the last of two equal keys without a word, so that a whole section of a config is lost.
"""

import json
from typing import Any

import yaml

from textdiff.errors import ConfigError


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
    except (ValueError, RecursionError) as error:  # a date that no calendar has, brackets by 1,000
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
    """Parse strict JSON: no key twice, no NaN or infinity.

    Raises:
        ValueError: it is not; the message says why.
    """
    return json.loads(
        text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_integer
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice; keep one of them")
        found[key] = value
    return found


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python converts no longer ones, in either direction
        raise ValueError(
            f"an integer of {len(digits)} digits, and 4300 are allowed; write it as a string"
        ) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
