"""Flags of the verbs that generate text, made from the options of a generation."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import tyro

from textdiff.commands.arguments import BlockSize, Dtype, given_text, held_model
from textdiff.commands.inputs import STANDARD_INPUT, read_text
from textdiff.errors import ConfigError
from textdiff.sampling.settings import SamplingConfig, read_knobs

if TYPE_CHECKING:
    from textdiff.pipeline import TextDiffusion


def _flag_type(annotation: Any) -> Any:
    """Return what a flag takes: words of a list, or one value; two types of value are a text."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _flag_type(arguments[0])
    if origin in (Union, UnionType):
        return _flag_type([leaf for leaf in arguments if leaf is not type(None)][-1])
    return tuple[str, ...] if origin in (tuple, dict) else annotation


def _flags() -> list[tuple[str, Any, Any]]:
    """Return name, type and default of every flag; unset ones take the model's own default."""
    flags = []
    for name, option in SamplingConfig.model_fields.items():
        kind, meaning = _flag_type(option.annotation), str(option.description)
        default = () if get_origin(kind) is tuple else option.default if name == "cache" else None
        kind = kind | None if default is None else kind
        meaning = f"{meaning[0].upper()}{meaning[1:]}."
        flags.append((name, Annotated[kind, tyro.conf.arg(help=meaning)], field(default=default)))
    suffix = tyro.conf.arg(help="Text that follows what is generated.")
    seed = tyro.conf.arg(help="Seed; the same seed gives the same text.")
    flags.append(("suffix", Annotated[str, suffix], field(default="")))
    flags.append(("seed", Annotated[int, seed], field(default=0)))
    return flags


def _options(self: Any) -> dict[str, Any]:
    """Return options of `TextDiffusion.generate` and `TextDiffusion.stream`; None is unset.

    Raises:
        ConfigError: a knob without a value, or a text that is not UTF-8.
    """

    def checked(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(checked(name, word) for word in value)
        return given_text(f"--{name}", value) if isinstance(value, str) else value

    options = {name: checked(name, getattr(self, name)) for name, *_ in _flags()}
    options["knobs"] = read_knobs(options["knobs"])
    return {
        name: None if value in ((), {}, "auto") and name != "stop" else value
        for name, value in options.items()
    }


_DOCUMENTATION = "How text is drawn. Unset options take the model's own defaults."
Sampling: Any = make_dataclass(
    "Sampling", _flags(), frozen=True, namespace={"options": _options, "__doc__": _DOCUMENTATION}
)

SamplingFlags = Annotated[Sampling, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    block_size: BlockSize = None
    """Tokens per block, of those that the model was trained in, or full; the default is the first
    of them."""

    device: str | None = None
    """Torch device; the default is CUDA if there is one, else the CPU."""

    dtype: Dtype = "float32"
    """Dtype of the network."""

    def load(self, name: str, default_device: str | None = None) -> "TextDiffusion":
        """Return the model of that name; see `held_model`."""
        return held_model(name, self.device or default_device, self.dtype, self.block_size)


LoadingFlags = Annotated[Loading, tyro.conf.arg(name="")]


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


def say_approximate(cache: object) -> None:
    """Report that a text is not quite the model's, if that was asked for."""
    if cache == "approximate":
        print(
            "note: the text is drawn from an approximation of the model: what was fixed or finished"
            " is kept as it was when its segment began (--cache off is exact)",
            file=sys.stderr,
        )


def written(value: Any) -> str:
    """Return an option as the command line has it."""
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else str(value)
