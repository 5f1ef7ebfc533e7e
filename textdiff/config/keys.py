"""The keys of a config: which there are, what each may hold, and a description of them all."""

from collections.abc import Iterator, Sequence
from textwrap import fill, wrap
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from textdiff.config.schema import Config
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


def kind_of(section: type[Section]) -> str | None:
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


def describe(config: Config) -> str:
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
        summary = "" if kind_of(type(value)) else f" {value.summary()}"
        lines += ["", *wrap(f"{name}:{summary}", WIDTH)]
        lines += _rows(name, value, annotation_of(field))
    return "\n".join(lines)


def _rows(path: str, section: Section, annotation: Any) -> Iterator[str]:
    """Yield the lines of a section; `annotation` names the other kinds that it could be of."""
    for name, field in type(section).model_fields.items():
        value, key, below = getattr(section, name), f"{path}.{name}", annotation_of(field)
        if name == "kind":
            kinds = " | ".join(str(kind_of(variant)) for variant in variants(annotation))
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
