"""Sentences for what pydantic refuses of a config, by the locations of its errors."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from textdiff.config.schema import Config
from textdiff.config.walks import at, kind_of, step, variants

# What values of a type are called; pydantic's errors of these types say the same at more length.
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "tuple_type": "a list",
}


def explain(error: ValidationError, where: str, flags: Mapping[tuple[str, ...], str]) -> str:
    """Say what is wrong, one clause for each key.

    Args:
        error: what the schema refused.
        where: the config file.
        flags: the flags that set keys, by the keys' paths; others come from the file.
    """
    clauses, named = [], False
    for group in _by_key(error):
        flag = flags.get(tuple(_without_kinds(group[0]["loc"])))
        if flag is None and not named:
            clauses.append(f"{where}: {_explain_key(group, None)}")
            named = True
        else:
            clauses.append(_explain_key(group, flag))
    return "; ".join(clauses)


def _by_key(error: ValidationError) -> list[list[dict[str, Any]]]:
    """Group the errors of each key: a value that may have several types fails once for each."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_key(item["loc"]), []).append(dict(item))
    return [[item | {"loc": key} for item in items] for key, items in found.items()]


def _key(location: Sequence[int | str]) -> tuple[str, ...]:
    """Return an error's location without what lies within a value: items, types it may have."""
    node: Any = Config
    names = [str(name) for name in location]
    for depth, name in enumerate(names):
        if not variants(node):
            return tuple(names[:depth])
        node = step(node, name)
    return tuple(names)


def _explain_key(group: list[dict[str, Any]], flag: str | None) -> str:
    first, kinds = group[0], {item["type"] for item in group}
    path = ".".join(_without_kinds(first["loc"]))
    subject = flag or (f"`{path}`" if path else "")
    if kinds & {"model_type", "model_attributes_type"}:
        return _no_section(subject, first["loc"], first["input"])
    if "extra_forbidden" in kinds:
        return _unknown_key(path, first["loc"], flag)
    if "missing" in kinds:
        return f"`{path}` is missing"
    if kinds & {"union_tag_invalid", "union_tag_not_found"}:
        found = first["ctx"].get("tag", "nothing")
        known = first["ctx"].get("expected_tags", "the known kinds")
        return f"`{path}.kind` is {found}; it must be one of {known}"
    if kinds <= set(_TYPES):
        wanted = list(dict.fromkeys(_TYPES[item["type"]] for item in group))
        return f"{subject}: {_shown(first['input'])} is not {' or '.join(wanted)}"
    wants = [item["msg"].removeprefix("Input should be ") for item in group]
    message = " or ".join([first["msg"], *wants[1:]]).removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {_shown(first['input'])})"
    return f"{subject}: {message}{given}" if subject else message


def _shown(value: Any) -> str:
    """Show a value, a long one by its beginning."""
    return "nothing" if value is None else f"{value!r:.60}"


def _unknown_key(path: str, names: Sequence[str], flag: str | None) -> str:
    section, known = _section_at(names[:-1])
    near = difflib.get_close_matches(names[-1], known, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}"
    if flag is not None:
        return f"{flag}: there is no key `{path}` in {section}; {hint}"
    return f"unknown key `{path}` in {section}; {hint}"


def _no_section(subject: str, names: Sequence[str], given: Any) -> str:
    """Say that a value stands where keys belong."""
    node = at(names)
    kinds = {kind_of(v) for v in variants(node)} - {None}
    first = "kind" if kinds else _section_at(names)[1][0]
    example = given if isinstance(given, str) and given in kinds else "…"
    return (
        f"{subject} is a section of keys, such as {{{first}: {example}}} (given: {_shown(given)})"
    )


def _section_at(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return a section's name in words and its keys, by an error's location."""
    node = at(names)
    kind = kind_of(node)
    where = ".".join(_without_kinds(names)) or "the config"
    return (f"{where} of kind {kind}" if kind else where), list(node.model_fields)


def _without_kinds(names: Sequence[str]) -> list[str]:
    """Drop the kinds that pydantic puts into the locations of unions."""
    node: Any = Config
    kept = []
    for name in map(str, names):
        if name not in [kind_of(v) for v in variants(node)]:
            kept.append(name)
        node = step(node, name)
    return kept
