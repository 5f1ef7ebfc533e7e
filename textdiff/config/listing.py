"""The help of a config: every key with its value, what it means and what it may be."""

from collections.abc import Iterator
from textwrap import fill, wrap
from typing import Any, Literal, get_args, get_origin

import yaml

from textdiff.config.schema import Config
from textdiff.config.walks import kind_of, leaves, variants
from textdiff.section import Section

WIDTH = 79
COLUMN = 40


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
        summary = "" if kind_of(type(value)) else f" {(type(value).__doc__ or '').splitlines()[0]}"
        lines += ["", *wrap(f"{name}:{summary}", WIDTH)]
        lines += _rows(name, value, field.annotation)
    return "\n".join(lines)


def _rows(path: str, section: Section, annotation: Any) -> Iterator[str]:
    """Yield the lines of a section; `annotation` names the other kinds that it could be of."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{path}.{name}"
        if name == "kind":
            kinds = [str(kind_of(variant)) for variant in variants(annotation)]
            yield from _row(key, value, f"{type(section).__doc__} ({' | '.join(kinds)})")
        elif isinstance(value, Section):
            yield from _rows(key, value, field.annotation)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from _rows(f"{key}.{index}", item, type(item))
        else:
            yield from _row(key, value, f"{field.description}{_choices(field.annotation)}")


def _choices(annotation: Any) -> str:
    found = [
        str(choice)
        for leaf in leaves(annotation)
        if get_origin(leaf) is Literal
        for choice in get_args(leaf)
    ]
    return f" ({' | '.join(found)})" if found else ""


def _row(key: str, value: Any, meaning: str) -> list[str]:
    shown = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    flag = f"  --{key.replace('_', '-')} {shown}"
    words = wrap(" ".join(meaning.split()), WIDTH - COLUMN, break_on_hyphens=False)
    if len(flag) >= COLUMN:
        return [flag, *(" " * COLUMN + word for word in words)]
    first, *rest = words or [""]
    return [f"{flag:<{COLUMN}}{first}", *(" " * COLUMN + word for word in rest)]
