"""Walks over the schema of a config: what a key takes, and which keys there are."""

from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from textdiff.config.schema import Config
from textdiff.section import Section


def variants(annotation: Any) -> list[type[Section]]:
    """List the section classes in an annotation such as `A | B`, `tuple[A, ...]`, `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, Annotated):
        return [v for part in get_args(annotation) for v in variants(part)]
    return []


def leaves(annotation: Any) -> list[Any]:
    """List the types that a value may have, unions and annotations taken apart."""
    if get_origin(annotation) is Annotated:
        return leaves(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [leaf for part in get_args(annotation) for leaf in leaves(part)]
    return [annotation]


def kind_of(section: type[Section]) -> str | None:
    """Return the `kind` of one of several sections that a key may hold."""
    field = section.model_fields.get("kind")
    return None if field is None else str(field.default)


def step(node: Any, name: str) -> Any:
    """Return the annotation below another one: of a key, of an item, or of a kind."""
    found = variants(node)
    for variant in found:
        if name in variant.model_fields:
            return variant.model_fields[name].annotation
        if kind_of(variant) == name:
            return variant
    return found[0] if found else node


def at(path: Sequence[str]) -> Any:
    """Return the annotation of a key by its path."""
    node: Any = Config
    for name in path:
        node = step(node, name)
    return node


def is_list(annotation: Any) -> bool:
    """Whether a key may hold a list."""
    return any(get_origin(leaf) is tuple for leaf in leaves(annotation))


def exists(path: Sequence[str]) -> bool:
    """Whether a key of this path can be in some config."""
    node: Any = Config
    for name in path:
        found = variants(node)
        if is_list(node) and name.isdecimal():
            node = found[0] if found else None
        elif any(name in variant.model_fields for variant in found) and not is_list(node):
            node = step(node, name)
        else:
            return False
    return True


def keys(node: Any = Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key; items of lists have the index 0."""
    for variant in variants(node):
        for name, field in variant.model_fields.items():
            below = (*path, name)
            yield below
            item = (*below, "0") if is_list(field.annotation) else below
            yield from keys(field.annotation, item)
