"""The command line of a verb, read by the signature of its function.

Parameters before `/` are arguments, others are options, and a dataclass or section among them is a
group whose fields are options. argparse sorts the words and writes the help; pydantic reads them
by their types, and its errors say which value is wrong.
"""

import argparse
import ast
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from textwrap import dedent, fill
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BaseModel, TypeAdapter, ValidationError

from textdiff.config.keys import leaves
from textdiff.errors import ConfigError

T = TypeVar("T")
_KINDS = {int: ("INT", "a whole number"), float: ("FLOAT", "a number"), Path: ("PATH", "a path")}
_UNREADABLE = {"int_parsing", "int_from_float", "float_parsing", "literal_error"}


class Named(NamedTuple):
    """Annotation of an option whose name differs from its parameter's."""

    name: str


@dataclass(frozen=True)
class Option:
    """One option or argument of a verb.

    Attributes:
        flag: as it is typed, `--top-p`; an argument's name in messages, `MODEL`.
        path: the parameter, and the field where that is a group.
        annotation: type of the value.
        default: the value without it, for the help.
        meaning: one or two sentences of help.
    """

    flag: str
    path: tuple[str, ...]
    annotation: Any
    default: Any
    meaning: str

    @property
    def several(self) -> bool:
        """True where it takes more than one word."""
        return get_origin(self.annotation) is tuple

    @property
    def types(self) -> list[Any]:
        """The types that a word may have, None last."""
        types = leaves(get_args(self.annotation)[0] if self.several else self.annotation)
        return sorted(types, key=lambda kind: kind is type(None))

    def add_to(self, group: Any) -> None:
        """Declare the option to argparse."""
        several = isinstance(self.default, tuple)
        value = " ".join(map(str, self.default)) if several else self.default
        shown = (isinstance(value, str | float) and value != "") or type(value) is int
        text = self.meaning.replace("%", "%%") + f" (default: {value})" * shown
        count: str | int | None = "*" if self.several else "?"
        if self.annotation is bool:
            group.add_argument(self.flag, dest=self.flag, action="store_true", help=text)
        elif not self.flag.startswith("-"):
            group.add_argument(self.flag, nargs=count, metavar=self.flag, help=text)
        else:
            items = get_args(self.annotation) if self.several else ()
            count = "*" if ... in items else len(items) or None
            names = "|".join(_kind(kind)[0] for kind in self.types if kind is not type(None))
            group.add_argument(self.flag, nargs=count, metavar=names, dest=self.flag, help=text)

    def read(self, words: str | list[str] | bool) -> Any:
        """Return the words as pydantic takes them."""
        if isinstance(words, list):
            return tuple(map(self._word, words))
        return words if isinstance(words, bool) else self._word(words)

    def _word(self, word: str) -> Any:
        if word == "None" and type(None) in self.types:
            return None
        if float in self.types:
            with suppress(ValueError):
                if not math.isfinite(float(word)):
                    message = f"{self.flag} {word}: give a finite number"
                    raise ConfigError(message, code="finite_number")
        if Path not in self.types:
            return word
        try:
            return Path(word).expanduser()
        except RuntimeError:
            message = f"this user does not exist; write ./{word} if that is a name"
            raise ConfigError(f"{self.flag} {word}: {message}", code="unknown_user") from None


def _parser(
    function: Callable[..., Any], prog: str, options: Sequence[Option]
) -> argparse.ArgumentParser:
    """Return a parser that sorts words only: types and missing arguments are checked later."""
    about = (inspect.getdoc(function) or "").partition("\n\nArgs:")[0]
    words = [o.flag + "..." * o.several for o in options if not o.flag.startswith("-")]
    parser = argparse.ArgumentParser(
        prog,
        usage=" ".join([prog, *words, "[OPTIONS]"]),
        description="\n\n".join(fill(paragraph, 79) for paragraph in about.split("\n\n")),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 26, 79),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    hints = get_type_hints(function)
    groups: dict[str, Any] = {"": parser}
    for option in options:
        heading = ""
        if len(option.path) > 1:
            heading = (inspect.getdoc(hints[option.path[0]]) or "").partition("\n")[0].rstrip(".")
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        option.add_to(groups[heading])
    return parser


def parse_verb(function: Callable[..., T], prog: str, words: Sequence[str]) -> Callable[[], T]:
    """Return the call of a verb that a command line asks for.

    Args:
        function: the verb.
        prog: the command as the user typed it.
        words: the command line after it.

    Raises:
        ConfigError: an unknown option, a value that cannot be read, or one that is missing.
        SystemExit: by `--help` (0).
    """
    try:
        values = _values(function, prog, words)
    except ConfigError as error:
        more = "" if str(error).endswith("?") else f"; see {prog} --help"
        raise ConfigError(f"{error}{more}", code=error.code) from None
    parameters = inspect.signature(function).parameters.values()
    first = [values.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
    return functools.partial(function, *first, **values)


def _values(function: Callable[..., Any], prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of a verb, groups included."""
    options = list(options_of(function))
    given = _sorted(_parser(function, prog, options), options, words)
    values: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        own = {
            option.path[-1]: option.read(given[option.flag])
            for option in options
            if option.path[0] == name and option.flag in given
        }
        annotation = _bare(get_type_hints(function, include_extras=True)[name])
        if not own and not _is_group(annotation):
            option = next(option for option in options if option.path == (name,))
            if parameter.default is parameter.empty and not option.several:
                message = f"{option.flag} is missing: {option.meaning}".rstrip(": .")
                raise ConfigError(message, code="missing_argument")
            values[name] = () if parameter.default is parameter.empty else parameter.default
            continue
        try:
            raw = own if _is_group(annotation) else own[name]
            values[name] = TypeAdapter(annotation).validate_python(raw)
        except ValidationError as error:
            raise _refused(error, [o for o in options if o.path[0] == name]) from None
    return values


def _sorted(
    parser: argparse.ArgumentParser, options: Sequence[Option], words: Sequence[str]
) -> dict[str, Any]:
    """Return the words of each option that a command line gives, by its flag.

    Raises:
        ConfigError: an unknown option or one without a value.
    """
    spelled = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
    try:
        given, left = parser.parse_known_intermixed_args(spelled)
    except argparse.ArgumentError as error:
        has_value = "ignored explicit" in error.message
        code = "no_value" if has_value else "missing_value"
        what = "takes no value" if has_value else "needs a value"
        raise ConfigError(f"{error.argument_name} {what}", code=code) from None
    for word in left:
        if len(word) > 1 and word.startswith("-"):
            typed = words[spelled.index(word)].partition("=")[0]
            names = [option.flag[2:] for option in options if option.flag.startswith("-")]
            near = difflib.get_close_matches(word.partition("=")[0].lstrip("-"), names, n=1)
            hint = f"; did you mean --{near[0]}?" if near else ""
            raise ConfigError(f"unknown option {typed}{hint}", code="unknown_option")
    if left:
        raise ConfigError(f"unexpected argument {left[0]!r}", code="unexpected_argument")
    return vars(given)


def _refused(error: ValidationError, options: Sequence[Option]) -> ConfigError:
    """Return the error about the first value of a parameter that pydantic refuses."""
    first = error.errors(include_url=False)[0]
    named = [
        option for option in options if option.path[1:] == first["loc"][: len(option.path) - 1]
    ]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if len(named) != 1:  # the group as a whole
        return ConfigError(message, code=first["type"])
    (option,), value = named, first["input"]
    if first["type"] not in _UNREADABLE:
        return ConfigError(f"{option.flag} {value}: {message}", code=first["type"])
    takes = " or ".join(_kind(kind)[1] for kind in option.types)
    return ConfigError(f"{option.flag}: {value!r} is not {takes}", code=first["type"])


def options_of(function: Callable[..., Any]) -> Iterator[Option]:
    """Yield the arguments and options of a verb, its own before those of its groups."""
    hints, meanings = get_type_hints(function, include_extras=True), _argument_docs(function)
    groups = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if _is_group(_bare(hints[name])):
            groups[name] = _bare(hints[name])
            continue
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        flag = name.upper() if positional else _flag(name, hints[name])
        meaning = meanings.get(name, "")
        yield Option(flag, (name,), _bare(hints[name]), parameter.default, meaning)
    for parameter_name, group in groups.items():
        own, meanings = get_type_hints(group, include_extras=True), dict(_field_docs(group))
        if issubclass(group, BaseModel):
            meanings |= {n: f.description for n, f in group.model_fields.items() if f.description}
            defaults = {n: f.default for n, f in group.model_fields.items()}
        else:
            defaults = {field.name: field.default for field in fields(group)}
        for name, default in defaults.items():
            path, meaning = (parameter_name, name), meanings.get(name, "")
            yield Option(_flag(name, own[name]), path, _bare(own[name]), default, meaning)


def _flag(name: str, annotation: Any) -> str:
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    typed = next((mark.name for mark in marks if getattr(mark, "name", None)), name)
    return "--" + str(typed).replace("_", "-")


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _is_group(annotation: Any) -> bool:
    a_class = isinstance(annotation, type) and get_origin(annotation) is None
    return a_class and (is_dataclass(annotation) or issubclass(annotation, BaseModel))


def _kind(kind: Any) -> tuple[str, str]:
    """Return a type's name in help and in messages."""
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return "|".join(choices), " or ".join(choices)
    return ("None", "None") if kind is type(None) else _KINDS.get(kind, ("TEXT", "a text"))


def _argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """Return the meaning of each parameter, by the `Args:` of the docstring."""
    section = (inspect.getdoc(function) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


@functools.cache  # to parse the source takes longer than the rest of a command line
def _field_docs(group: type) -> Mapping[str, str]:
    """Return the text below each field of a class."""
    (tree,) = ast.parse(dedent(inspect.getsource(group))).body
    pairs = zip(tree.body, tree.body[1:], strict=False) if isinstance(tree, ast.ClassDef) else ()
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
