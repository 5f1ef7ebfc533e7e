"""Flags of the verbs that generate text, made from the options of a generation."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import Field, create_model

from textdiff.commands.arguments import (
    STANDARD_INPUT,
    given_text,
    read_text,
    writable,
)
from textdiff.errors import ConfigError, DataError
from textdiff.sampling.rules import RULES
from textdiff.sampling.settings import SamplingConfig, read_knobs
from textdiff.section import Section

if TYPE_CHECKING:
    from textdiff.data.conversations import Message


def flag_type(annotation: Any) -> Any:
    """Return what a flag takes: words of a list, or one value; two types of value are a text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return flag_type(arguments[0])
    if origin in (Union, UnionType):
        return flag_type([leaf for leaf in arguments if leaf is not type(None)][-1])
    return tuple[str, ...] if origin in (tuple, dict) else annotation


def _of_rules(name: str) -> str:
    """Return what the registry of rules adds to an option's help."""
    if name == "rule":
        return ": " + ", ".join(RULES)
    knobs = [
        f"{kind} has {', '.join(rule.knobs())}" for kind, rule in RULES.items() if rule.knobs()
    ]
    return "; " + "; ".join(knobs) if name == "knobs" else ""


def _flags() -> dict[str, Any]:
    """Return type and default of every flag; unset ones take the model's own default."""
    flags: dict[str, Any] = {}
    for name, option in SamplingConfig.model_fields.items():
        kind, meaning = flag_type(option.annotation), str(option.description)
        default = () if get_origin(kind) is tuple else option.default if name == "cache" else None
        kind = kind | None if default is None else kind
        meaning = f"{meaning[0].upper()}{meaning[1:]}{_of_rules(name)}."
        flags[name] = (kind, Field(default, description=meaning))
    flags["suffix"] = (str, Field("", description="Text that follows what is generated."))
    flags["seed"] = (int, Field(0, description="Seed; the same seed gives the same text."))
    return flags


class Sampling(create_model("SamplingFlags", __base__=Section, **_flags())):  # type: ignore[misc]
    """Options of sampling."""

    def options(self) -> dict[str, Any]:
        """Return options of `TextDiffusion.generate` and `TextDiffusion.stream`; None is unset.

        Raises:
            ConfigError: a knob without a value, or a text that is not UTF-8.
        """
        options = {name: _checked(name, value) for name, value in self}
        options["knobs"] = read_knobs(options["knobs"])
        return {
            name: None if value in ((), {}, "auto") and name != "stop" else value
            for name, value in options.items()
        }


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_checked(name, word) for word in value)
    return given_text(f"--{name}", value) if isinstance(value, str) else value


@dataclass(frozen=True)
class ShowingOptions:
    """Display and recording of a generation."""

    watch: bool = False
    """Show the text in the terminal while it is denoised."""

    film: Path | None = None
    """Write the generation as a film to this HTML file, which plays in any browser, offline."""

    trace: Path | None = None
    """Write what each step did to this .jsonl file: row, step, position, token, probability."""

    def check(self) -> None:
        """Make sure, before a model runs, that files can be written.

        Raises:
            ConfigError: they cannot.
        """
        writable("--film", self.film)
        writable("--trace", self.trace)


def read_template(path: str, prompt: str, suffix: str) -> str:
    """Return the text with holes in a file, without a line break at its very end.

    Args:
        path: the file; `-` is standard input.
        prompt: the command line's own, which a template excludes.
        suffix: likewise.

    Raises:
        ConfigError: a prompt beside it, or no hole in it.
        DataError: the file cannot be read.
    """
    from textdiff.sampling.template import pieces_of

    if prompt or suffix:
        raise ConfigError("--template holds the whole text: leave PROMPT and --suffix out")
    name = STANDARD_INPUT if path == "-" else path
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if all(isinstance(piece, str) for piece in pieces_of(text)):
        raise ConfigError(f"{name} has no hole: write [MASK:n] where n tokens are to be filled in")
    return text


def read_conversations(path: str) -> "list[list[Message]]":
    """Return the conversations in a JSON file: one, or a list of them.

    Args:
        path: the file; `-` is standard input.

    Raises:
        DataError: it cannot be read, is not JSON, or holds something else.
    """
    from textdiff.data.plain_data import parse_json
    from textdiff.sampling.chat import checked_conversations

    name = STANDARD_INPUT if path == "-" else path
    try:
        raw = parse_json(read_text(path))
    except RecursionError:
        raise DataError(f"{name} is not JSON: too deeply nested", code="not_json") from None
    except ValueError as error:
        raise DataError(f"{name} is not JSON: {error}", code="not_json") from None
    return checked_conversations(raw, name)


def say_approximate(cache: object) -> None:
    """Report that a text is not quite the model's, if that was asked for."""
    if cache == "approximate":
        print(
            "note: the text is drawn from an approximation of the model: what was fixed or finished"
            " is kept as it was when its segment began (--cache off is exact)",
            file=sys.stderr,
        )
