"""Reading and writing a config: YAML, command-line flags over it, errors that name the key.

`load` reads YAML and applies flags; `to_yaml` writes the resolved config back. An unknown key is
answered with the nearest known name.
"""

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from textdiff.config import Config, Section
from textdiff.errors import ConfigError
from textdiff.flags import parse


def load(
    path: str | Path, flags: Sequence[str] = (), prog: str = "textdiff train CONFIG"
) -> Config:
    """Reads a YAML file and applies flags over it.

    Args:
        path: the YAML file; absent sections and keys take their defaults.
        flags: `--section.key value` pairs; a `kind` and JSON values replace keys of the YAML before
            the remaining flags are read, so a variant can be switched from the command line.
        prog: what `--help` shows as the command.

    Raises:
        ConfigError: the file cannot be read, or a key or a value is wrong.
        SystemExit: by `--help` (0).
    """
    raw = _read_yaml(Path(path))
    rest = _merge_structured(raw, list(flags))
    config = _base(raw, rest, str(path))
    return _apply_flags(config, rest, prog) if rest else config


def validate(raw: Mapping[str, Any], where: str = "config") -> Config:
    """Checks plain data against the schema.

    Raises:
        ConfigError: with one line for each wrong key.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, every key written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; see configs/ for complete ones") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected sections such as `train:`, found {raw!r:.60}")
    return raw


def _merge_structured(raw: dict[str, Any], flags: list[str]) -> list[str]:
    """Moves `--a.kind x` and `--a.b '[json]'` from the flags into `raw`.

    Returns:
        The other flags.
    """
    rest: list[str] = []
    index = 0
    while index < len(flags):
        name, equals, value = flags[index].partition("=")
        if name.startswith("--") and not equals and index + 1 < len(flags):
            value = flags[index + 1]
        key = name.removeprefix("--").replace("-", "_")
        structured = key.endswith(".kind") or value[:1] in ("[", "{")
        if name.startswith("--") and structured:
            _assign(raw, key.split("."), _json(name, value))
            index += 1 if equals else 2
        else:
            rest.append(flags[index])
            index += 1
    return rest


def _base(raw: dict[str, Any], flags: list[str], where: str) -> Config:
    """The config that plain flags are applied to.

    Keys that exclude each other are judged with the flags' values in place: flags may complete what
    the file and the variants leave inconsistent, and what they break is said in our words.
    """
    whole = _with_values(raw, flags)
    try:
        complete = Config.model_validate(whole)
    except ValidationError as error:
        # Unknown flags and values that cannot be read are left to the parser, which shows the flag.
        if not all(any(map(_unreadable, group)) for group in _by_key(error)):
            raise ConfigError(f"{where}: {_explain(error)}") from None
        return validate(raw, where)
    try:
        return Config.model_validate(raw)
    except ValidationError:
        return complete


def _with_values(raw: dict[str, Any], flags: list[str]) -> dict[str, Any]:
    """A copy of `raw` with the values of plain `--section.key value` flags."""
    whole = copy.deepcopy(raw)
    for index, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or "." not in name:
            continue
        if not equals:
            value = flags[index + 1] if index + 1 < len(flags) else ""
        path = name.removeprefix("--").replace("-", "_").split(".")
        _assign(whole, path, yaml.safe_load(_PLAIN.get(value, value)))
    return whole


def _json(name: str, value: str) -> Any:
    if value[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: not valid JSON ({error})") from None


def _assign(raw: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = raw
    for name in path[:-1]:
        if isinstance(node, list):
            node = node[int(name)]
        else:
            if node.get(name) is None:
                node[name] = {}
            node = node[name]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--{'.'.join(path)}: `{name}` holds a value, not a section")
    node[path[-1]] = value


def _unreadable(item: Mapping[str, Any]) -> bool:
    kind = str(item["type"])
    return kind == "extra_forbidden" or kind.endswith(("_type", "_parsing", "_from_float"))


_PLAIN = {"True": "true", "False": "false", "None": "null", "none": "null"}
_WORDS = {"true": "True", "false": "False", "null": "None", "none": "None"}


def _plain_words(flag: str) -> str:
    """YAML's spelling of truth and nothing, as Python's: `true`, `--a.b=null`."""
    name, equals, value = flag.partition("=")
    return name + equals + _WORDS.get(value, value) if equals else _WORDS.get(flag, flag)


def _apply_flags(config: Config, flags: list[str], prog: str) -> Config:
    import tyro

    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    return parse(Config, prog, [_plain_words(flag) for flag in flags], markers, default=config)


def _by_key(error: ValidationError) -> list[list[dict[str, Any]]]:
    """The errors of each key: a value that may be of several types fails once for each of them."""
    found: dict[tuple[int | str, ...], list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key(item["loc"]), []).append(dict(item))
    return [[item | {"loc": key} for item in items] for key, items in found.items()]


def _key(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """An error's location without what lies within a value: its items, the types it may be of."""
    node: Any = Config
    for depth, name in enumerate(location):
        if not _variants(node):
            return location[:depth]
        node = _step(node, str(name))
    return location


def _explain(error: ValidationError) -> str:
    return "; ".join(_explain_key(group) for group in _by_key(error))


def _explain_key(group: list[dict[str, Any]]) -> str:
    wants = [item["msg"].removeprefix("Input should be ") for item in group]
    return _explain_one(group[0] | {"msg": " or ".join([group[0]["msg"], *wants[1:]])})


def _explain_one(item: dict[str, Any]) -> str:
    names = [str(part) for part in item["loc"]]
    path = ".".join(_without_tags(names))
    if item["type"] in ("model_type", "model_attributes_type"):
        return _no_section(path, names, item["input"])
    if item["type"] == "extra_forbidden":
        section, known = _section_at(names[:-1])
        near = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
        return f"unknown key `{path}` in {section}; {hint}"
    if item["type"] == "missing":
        return f"`{path}` is missing"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        context = item["ctx"]
        found = context.get("tag", "nothing")
        known = context.get("expected_tags", "the known kinds")
        return f"`{path}.kind` is {found}; it must be one of {known}"
    message = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    given = "" if item["type"] == "value_error" else f" (given: {item['input']!r:.60})"
    return f"`{path}`: {message}{given}" if path else message


def _no_section(path: str, names: list[str], given: Any) -> str:
    """A value where keys belong."""
    node: Any = Config
    for name in names:
        node = _step(node, name)
    kinds = {v.model_fields["kind"].default for v in _variants(node) if "kind" in v.model_fields}
    keys = ["kind"] if kinds else list(_section_at(names)[1])
    example = given if isinstance(given, str) and given in kinds else "…"
    found = "nothing" if given is None else f"{given!r:.60}"
    return f"`{path}` is a section of keys, such as {{{keys[0]}: {example}}} (given: {found})"


def _section_at(names: list[str]) -> tuple[str, list[str]]:
    """Walks the schema along an error's location; returns the section's words and its keys."""
    node: Any = Config
    for name in names:
        node = _step(node, name)
    tag = node.model_fields["kind"].default if "kind" in node.model_fields else None
    where = ".".join(_without_tags(names)) or "the config"
    return (f"{where} of kind {tag}" if tag else where), list(node.model_fields)


def _step(node: Any, name: str) -> Any:
    for variant in _variants(node):
        if name in variant.model_fields:
            return variant.model_fields[name].annotation
        if "kind" in variant.model_fields and variant.model_fields["kind"].default == name:
            return variant
    inner = [v for v in _variants(node)]
    return inner[0] if inner else node


def _variants(annotation: Any) -> list[type[Section]]:
    """Every section class in an annotation such as `A | B`, `tuple[A, ...]` or `Annotated[A]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return [v for part in get_args(annotation) for v in _variants(part)]
    return []


def _without_tags(names: list[str]) -> list[str]:
    """Drops the discriminator values that pydantic puts into locations of unions."""
    node: Any = Config
    kept = []
    for name in names:
        tags = [v.model_fields["kind"].default for v in _variants(node) if "kind" in v.model_fields]
        if name not in tags:
            kept.append(name)
        node = _step(node, name)
    return kept
