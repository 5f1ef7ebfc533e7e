"""Sentences for what pydantic refuses of a config, by the locations of its errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from textdiff.config.keys import at, kind_of, variants
from textdiff.errors import closest

# Names of types; pydantic's errors of these codes say the same at more length.
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


def explain(
    error: ValidationError, raw: Any, where: str, flags: Mapping[tuple[str, ...], str]
) -> str:
    """Say what is wrong, one clause for each key.

    Args:
        error: what the schema refused.
        raw: the data that was refused.
        where: the config file.
        flags: the flags that set keys, by the keys' paths; others come from the file.
    """
    by_key: dict[tuple[str, ...], list[Any]] = {}
    for item in error.errors(include_url=False):  # a value of several types fails once for each
        by_key.setdefault(_key(item["loc"]), []).append(item)
    clauses, named = [], False
    for path, items in by_key.items():
        clause = _explain_key(path, items, flags.get(path), raw)
        if path not in flags and not named:
            clause, named = f"{where}: {clause}", True
        clauses.append(clause)
    return "; ".join(clauses)


def _key(location: Sequence[int | str]) -> tuple[str, ...]:
    """Return the key of an error's location, without kinds, types of a value and items in it."""
    path: tuple[str, ...] = ()
    for name in map(str, location):
        sections = variants(at(path))
        if not sections:
            break
        if name not in [kind_of(section) for section in sections]:
            path = (*path, name)
    return path


def _explain_key(path: tuple[str, ...], items: list[Any], flag: str | None, raw: Any) -> str:
    first, codes = items[0], {item["type"] for item in items}
    key = ".".join(path)
    subject = flag or (f"`{key}`" if key else "")
    if codes & {"model_type", "model_attributes_type"}:
        return f"{subject} is a section of keys, such as {_example(path, first['input'])}"
    if "extra_forbidden" in codes:
        return _unknown_key(path, flag, raw)
    if "missing" in codes:
        return f"`{key}` is missing"
    if codes & {"union_tag_invalid", "union_tag_not_found"}:
        kind = first["ctx"].get("tag", "nothing")
        known = first["ctx"].get("expected_tags", "the known kinds")
        return f"`{key}.kind` is {kind}; it must be one of {known}"
    if codes <= set(_TYPES):
        wanted = list(dict.fromkeys(_TYPES[item["type"]] for item in items))
        return f"{subject}: {_shown(first['input'])} is not {' or '.join(wanted)}"
    wants = [item["msg"].removeprefix("Input should be ") for item in items]
    message = " or ".join([first["msg"], *wants[1:]]).removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {_shown(first['input'])})"
    return f"{subject}: {message}{given}" if subject else message


def _shown(value: Any) -> str:
    """Show a value, a long one by its beginning."""
    return "nothing" if value is None else f"{value!r:.60}"


def _example(path: tuple[str, ...], given: Any) -> str:
    """Show a section that could stand in place of a value."""
    kinds = [kind_of(section) for section in variants(at(path))]
    example = given if isinstance(given, str) and given in kinds else "…"
    first = "kind" if any(kinds) else next(iter(variants(at(path))[0].model_fields))
    return f"{{{first}: {example}}} (given: {_shown(given)})"


def _unknown_key(path: tuple[str, ...], flag: str | None, raw: Any) -> str:
    sections = variants(at(path[:-1]))
    for name in path[:-1]:
        raw = raw[int(name)] if isinstance(raw, Sequence) else raw[name]
    section = next((s for s in sections if kind_of(s) == raw.get("kind")), sections[0])
    kind = f" of kind {kind_of(section)}" if kind_of(section) else ""
    place = f"{'.'.join(path[:-1]) or 'the config'}{kind}"
    hint = closest(path[-1], section.model_fields)
    start = "unknown key" if flag is None else f"{flag}: there is no key"
    return f"{start} `{'.'.join(path)}` in {place}; {hint}"
