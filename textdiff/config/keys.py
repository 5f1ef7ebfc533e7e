"""The keys of a config: which there are, what each may hold, and sentences about them.

`describe_keys` describes all of them, `explain` says what the schema refuses.
"""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill, wrap
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from textdiff.config.schema import Config
from textdiff.errors import closest
from textdiff.registry import NameOf, OneOf
from textdiff.section import Section

WIDTH = 79
COLUMN = 40


def annotation_of(field: FieldInfo) -> Any:
    """Return a key's annotation together with the metadata that pydantic takes out of it."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def variants(annotation: Any) -> list[type[Section]]:
    """List the sections that a key may hold, one or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    for extra in _metadata(annotation):
        if isinstance(extra, OneOf):
            return list(extra.registry.values())
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return [section for each in get_args(annotation) for section in variants(each)]
    return []


def leaves(annotation: Any) -> list[Any]:
    """List the types that a value may have, unions and annotations taken apart."""
    if get_origin(annotation) is Annotated:
        return leaves(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [leaf for each in get_args(annotation) for leaf in leaves(each)]
    return [annotation]


def _metadata(annotation: Any) -> Sequence[Any]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def section_kind(section: type[Section]) -> str | None:
    """Return the `kind` of a section that is one of several."""
    field = section.model_fields.get("kind")
    return None if field is None else str(field.default)


def is_list(annotation: Any) -> bool:
    """Return whether a key may hold a list."""
    return any(get_origin(leaf) is tuple for leaf in leaves(annotation))


def at(path: Sequence[str]) -> Any:
    """Return what a key may hold, by its path; None: no config has such a key."""
    node: Any = Config
    for name in path:
        sections = variants(node)
        if is_list(node):
            node = sections[0] if name.isdecimal() and sections else None
        else:
            fields = [s.model_fields[name] for s in sections if name in s.model_fields]
            node = annotation_of(fields[0]) if fields else None
    return node


def keys(node: Any = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key; items of lists have the index 0."""
    for section in variants(node):
        for name, field in section.model_fields.items():
            below, annotation = (*path, name), annotation_of(field)
            yield below
            yield from keys(annotation, (*below, "0") if is_list(annotation) else below)


def describe_keys(config: Config) -> str:
    """Describe every key of a config as the flag that changes it."""
    lines = [
        fill(
            "Every key with its value; --section.key VALUE, --section.key=VALUE or "
            "section.key=VALUE changes one. Lists and sections are written as JSON.",
            WIDTH,
        )
    ]
    for name, field in Config.model_fields.items():
        value = getattr(config, name)
        summary = "" if section_kind(type(value)) else f" {value.summary()}"
        lines += ["", *wrap(f"{name}:{summary}", WIDTH)]
        lines += _rows(name, value, annotation_of(field))
    return "\n".join(lines)


def _rows(path: str, section: Section, annotation: Any) -> Iterator[str]:
    """Yield the lines of a section; `annotation` names the other kinds that it could be of."""
    for name, field in type(section).model_fields.items():
        value, key, below = getattr(section, name), f"{path}.{name}", annotation_of(field)
        if name == "kind":
            kinds = " | ".join(str(section_kind(variant)) for variant in variants(annotation))
            yield from _row(key, value, f"{section.summary()} ({kinds})")
        elif isinstance(value, Section):
            yield from _rows(key, value, below)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from _rows(f"{key}.{index}", item, below)
        else:
            choices = " | ".join(map(str, _choices(below)))
            yield from _row(key, value, f"{field.description}{choices and f' ({choices})'}")


def _choices(annotation: Any) -> list[Any]:
    literals = [leaf for leaf in leaves(annotation) if get_origin(leaf) is Literal]
    names = [name for m in _metadata(annotation) if isinstance(m, NameOf) for name in m.names]
    return names + [choice for literal in literals for choice in get_args(literal)]


def _row(key: str, value: Any, meaning: str) -> list[str]:
    shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    flag = f"  --{key.replace('_', '-')} {shown}"
    words = wrap(" ".join(meaning.split()), WIDTH - COLUMN, break_on_hyphens=False)
    if len(flag) >= COLUMN:
        return [flag, *(" " * COLUMN + word for word in words)]
    first, *rest = words or [""]
    return [f"{flag:<{COLUMN}}{first}", *(" " * COLUMN + word for word in rest)]


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
        if name not in [section_kind(section) for section in sections]:
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
    if "literal_error" in codes and codes <= {"literal_error", "tuple_type"}:
        return f"{subject}: {_not_a_choice(path, items)}"
    wants = [item["msg"].removeprefix("Input should be ") for item in items]
    message = " or ".join([first["msg"], *wants[1:]]).removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" else f" (given: {_shown(first['input'])})"
    return f"{subject}: {message}{given}" if subject else message


def _not_a_choice(path: tuple[str, ...], items: list[Any]) -> str:
    """Say which names a key may hold, one or a list of them, and the nearest to the one given."""
    refused = [item for item in items if item["type"] == "literal_error"]
    item = max(refused, key=lambda item: len(item["loc"]))  # an item of a list, not the list
    near = closest(str(item["input"]), map(str, _choices(at(path))))
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"{_shown(item['input'])} is not {item['ctx']['expected']}{hint}"


def _shown(value: Any) -> str:
    """Show a value, a long one by its beginning."""
    return "nothing" if value is None else f"{value!r:.60}"


def _example(path: tuple[str, ...], given: Any) -> str:
    """Show a section that could stand in place of a value."""
    kinds = [section_kind(section) for section in variants(at(path))]
    example = given if isinstance(given, str) and given in kinds else "…"
    first = "kind" if any(kinds) else next(iter(variants(at(path))[0].model_fields))
    return f"{{{first}: {example}}} (given: {_shown(given)})"


def _unknown_key(path: tuple[str, ...], flag: str | None, raw: Any) -> str:
    sections = variants(at(path[:-1]))
    for name in path[:-1]:
        raw = raw[int(name)] if isinstance(raw, Sequence) else raw[name]
    section = next((s for s in sections if section_kind(s) == raw.get("kind")), sections[0])
    kind = f" of kind {section_kind(section)}" if section_kind(section) else ""
    place = f"{'.'.join(path[:-1]) or 'the config'}{kind}"
    hint = closest(path[-1], section.model_fields)
    start = "unknown key" if flag is None else f"{flag}: the schema has no key"
    return f"{start} `{'.'.join(path)}` in {place}; {hint}"
