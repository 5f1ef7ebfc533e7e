"""What verbs that generate text have in common: their flags, and what these ask for."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from textdiff.commands.arguments import given_text
from textdiff.commands.inputs import STANDARD_INPUT, read_text
from textdiff.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How text is drawn. Unset options take the model's own defaults."""

    max_new_tokens: int | None = None
    """Tokens to generate."""

    steps: int | None = None
    """Denoising steps; more steps, better text, at most one network call each."""

    rule: str | None = None
    """Decoding rule."""

    knobs: tuple[str, ...] = ()
    """The rule's own settings as NAME=VALUE, such as order=margin; docs/sampling.md lists them."""

    temperature: str | None = None
    """0 takes the most likely token, 1 draws from the model; 0.8:0.4 falls from the first to the
    second while the text is denoised."""

    top_p: float | None = None
    """Draw among the most likely tokens up to this much probability."""

    top_k: int | None = None
    """Draw among the k most likely tokens."""

    min_p: float | None = None
    """Draw among tokens at least this share as likely as the likeliest."""

    repetition_penalty: float | None = None
    """Multiply log-probabilities of tokens that the text has already; 1 is none, 1.2 a usual
    value."""

    min_new_tokens: int | None = None
    """Tokens to generate before the text may end."""

    guidance: float | None = None
    """Weight of classifier-free guidance: away from what the model would write without the prompt,
    at two network calls per step; 0 is none."""

    regex: str | None = None
    """Regular expression that the text of every hole matches as a whole, up to where it ends.
    Matching texts are not drawn as often as the model writes them (docs/control.md)."""

    ban: tuple[str, ...] = ()
    """Strings that no hole holds."""

    force: tuple[str, ...] = ()
    """Strings that every hole holds, somewhere; to say where, write a template."""

    suffix: str = ""
    """Text that follows what is generated."""

    stop: tuple[str, ...] = ()
    """Strings that end a text; it is cut before them."""

    window: int | None = None
    """For models in blocks, tokens before a block that it sees, a multiple of the block size; the
    default is as many as in training, 0 is all. With a cache it is approximate."""

    stride: int | None = None
    """For full-sequence models, tokens added at a time beyond the context; the default is half the
    context."""

    cache: Literal["auto", "on", "off", "approximate"] = "auto"
    """Keep keys and values of finished blocks; auto: where that is exact, in blocks. approximate:
    for full-sequence models, keep those of what is given or finished, which changes the text."""

    seed: int = 0
    """Seed; the same seed gives the same text."""

    def options(self) -> dict[str, Any]:
        """Options of `TextDiffusion.generate` and `TextDiffusion.stream`.

        Raises:
            ConfigError: a knob without a value, or a text that is not UTF-8.
        """
        return {
            "max_new_tokens": self.max_new_tokens,
            "steps": self.steps,
            "rule": self.rule,
            "knobs": read_knobs(self.knobs) or None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_new_tokens,
            "guidance": self.guidance,
            "regex": None if self.regex is None else given_text("--regex", self.regex),
            "ban": tuple(given_text("--ban", text) for text in self.ban) or None,
            "force": tuple(given_text("--force", text) for text in self.force) or None,
            "suffix": given_text("--suffix", self.suffix),
            "stop": tuple(given_text("--stop", text) for text in self.stop),
            "window": self.window,
            "stride": self.stride,
            "cache": {"auto": None, "on": True, "off": False}.get(self.cache, self.cache),
            "seed": self.seed,
        }


def read_template(path: str, prompt: str, suffix: str) -> str:
    """The text with holes in a file; a line break at its very end is not part of it.

    Args:
        path: the file; `-` is standard input.
        prompt: the command line's own, which a template excludes.
        suffix: likewise.

    Raises:
        ConfigError: a prompt beside it, or no hole in it.
        DataError: the file cannot be read.
    """
    from textdiff.template import pieces_of

    if prompt or suffix:
        raise ConfigError("--template holds the whole text: leave PROMPT and --suffix out")
    name = STANDARD_INPUT if path == "-" else path
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    if all(isinstance(piece, str) for piece in pieces_of(text)):
        raise ConfigError(f"{name} has no hole: write [MASK:n] where n tokens are to be filled in")
    return text


def say_approximate(cache: bool | str | None) -> None:
    """Says that a text is not quite the model's, if that was asked for."""
    if cache == "approximate":
        print(
            "note: the text is drawn from an approximation of the model: what was given or finished"
            " is kept as it was when its segment began (--cache off is exact)",
            file=sys.stderr,
        )


def read_knobs(words: Sequence[str]) -> dict[str, Any]:
    """Settings of a rule, from NAME=VALUE; values are numbers, true, false, none or words.

    Raises:
        ConfigError: a word without a name or a value, or a name that comes twice.
    """
    knobs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals and value):
            raise ConfigError(f"--knobs {word}: give NAME=VALUE, such as order=margin")
        if name in knobs:
            raise ConfigError(f"--knobs gives {name} twice; give it once")
        knobs[name] = _value(value.strip())
    return knobs


def _value(word: str) -> Any:
    """A word as what it looks like."""
    if word.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(word.lower())
    try:
        return json.loads(word)
    except ValueError:
        return word
