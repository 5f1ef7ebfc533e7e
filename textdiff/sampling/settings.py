"""Options of a generation: each declared, described and checked once, without torch.

Configs, `generation_config.json`, flags, lines of batch files, sweeps and Python read it.
"""

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from textdiff.errors import CheckpointError, ConfigError, TextDiffError, closest, unknown
from textdiff.section import Number, Section, Whole

MOST_TOKENS = 10_000_000  # of a text; more would be a slip, and tables larger than memory
MOST_STEPS = 1_000_000


def _scalar(value: Any) -> Any:
    """Return numbers of NumPy and torch as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _integer(value: Any) -> Any:
    value = _scalar(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _temperature(value: Any) -> Any:
    """Return one number, or two as the text `FIRST:LAST`."""
    value = _scalar(value)
    if isinstance(value, bool) or value is None:
        raise PydanticKnownError("float_type")
    words = list(value) if isinstance(value, tuple) else str(value).split(":")
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise ValueError("give a number, or two as FIRST:LAST, such as 0.8:0.4")
    if not all(map(math.isfinite, numbers)):
        raise PydanticKnownError("finite_number")
    if min(numbers) < 0.0:
        raise PydanticKnownError("greater_than_equal", {"ge": 0})
    first, *last = numbers
    if not last:
        return first
    return value if isinstance(value, str) else f"{first}:{last[0]}"


def read_knobs(words: Sequence[str]) -> dict[str, Any]:
    """Return options of a rule from NAME=VALUE; values are numbers, true, false, none or words.

    Raises:
        ConfigError: a word without a name or a value, or a name that comes twice.
    """
    knobs: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals and value):
            raise ConfigError(f"knobs {word}: give NAME=VALUE, such as order=margin")
        if name in knobs:
            raise ConfigError(f"knobs: {name} is given twice; give it once")
        knobs[name] = _value(value.strip())
    return knobs


def _value(word: str) -> Any:
    if word.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(word.lower())
    try:
        return json.loads(word)
    except ValueError:
        return word


def _knobs(value: Any) -> Any:
    if isinstance(value, str | tuple):
        try:
            return read_knobs(shlex.split(value) if isinstance(value, str) else value)
        except ConfigError as error:
            raise ValueError(str(error)) from None
    return {k: _scalar(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _texts(value: Any) -> Any:
    """Return one text, or several, as a tuple."""
    if value is None or isinstance(value, str):
        return () if value is None else (value,)
    listed = isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | Mapping)
    return tuple(value) if listed else value


def _utf8(text: str) -> str:
    """Refuse halves of surrogate pairs, which no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticKnownError("string_unicode") from None
    return text


def _cache(value: Any) -> Any:
    named = {None: "auto", True: "on", False: "off"}
    return named[value] if value in (None, True, False) else value


Count = Annotated[Whole, BeforeValidator(_integer)]
Real = Annotated[Number, BeforeValidator(_scalar)]
Text = Annotated[str, AfterValidator(_utf8)]
Word = Annotated[str, StringConstraints(min_length=1), AfterValidator(_utf8)]
Texts = Annotated[tuple[Word, ...], BeforeValidator(_texts)]


class SamplingConfig(Section):
    """Rule, length and controls of a generation."""

    rule: str = Field("ancestral", description="decoding rule")
    knobs: Annotated[dict[str, Any], BeforeValidator(_knobs)] = Field(
        {},
        description="the rule's own options as NAME=VALUE, such as order=margin; docs/sampling.md "
        "lists them, and another rule does not take them over",
    )
    steps: Count = Field(
        64,
        ge=1,
        le=MOST_STEPS,
        description="denoising steps per block; more steps, better text, at most one network call "
        "each",
    )
    max_new_tokens: Count = Field(128, ge=1, le=MOST_TOKENS, description="tokens to generate")
    temperature: Annotated[float | str, BeforeValidator(_temperature)] = Field(
        1.0,
        description="0 takes the most likely token, 1 draws from the model; 0.8:0.4 falls from the "
        "first to the second while the text is denoised",
    )
    top_k: Count | None = Field(None, ge=1, description="draw among the k most likely tokens")
    top_p: Real = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="draw among the most likely tokens up to this much probability",
    )
    min_p: Real = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="draw among tokens at least this share as likely as the likeliest",
    )
    repetition_penalty: Real = Field(
        1.0,
        gt=0.0,
        description="multiply log-probabilities of tokens that the text has already; 1 is none, "
        "1.2 a usual value",
    )
    min_new_tokens: Count = Field(0, ge=0, description="tokens to generate before the text may end")
    guidance: Real = Field(
        0.0,
        ge=-1.0,
        description="weight of classifier-free guidance, away from what the model would write "
        "without the prompt, at two network calls per step; 0 is none, -1 ignores the prompt",
    )
    regex: Text | None = Field(
        None,
        description="regular expression that the text of every hole matches as a whole, up to "
        "where it ends; matching texts are not drawn as often as the model writes them "
        "(docs/control.md)",
    )
    ban: Texts = Field((), description="strings that no hole holds")
    force: Texts = Field(
        (),
        description="strings that every hole holds, somewhere; to say where, write a template",
    )
    stop: Texts = Field((), description="strings that end a text; it is cut before them")
    window: Count | None = Field(
        None,
        ge=0,
        description="for models in blocks, tokens before a block that it sees, a multiple of the "
        "block size; the default is as many as in training, 0 is all; with a cache it is "
        "approximate",
    )
    stride: Count | None = Field(
        None,
        ge=1,
        description="for full-sequence models, tokens added at a time beyond the context; the "
        "default is half the context",
    )
    cache: Annotated[Literal["auto", "on", "off", "approximate"], BeforeValidator(_cache)] = Field(
        "auto",
        description="keep keys and values of finished blocks; auto: where that is exact, in "
        "blocks; approximate: for full-sequence models, keep those of fixed and finished tokens, "
        "which changes the text",
    )

    @field_validator("rule")
    @classmethod
    def _known(cls, rule: str) -> str:
        # Rules are registered later too, and their modules import this one.
        from textdiff.sampling.rules import RULES

        if rule not in RULES:
            raise PydanticCustomError(
                "unknown_rule", "unknown rule; {hint}", {"hint": closest(rule, RULES)}
            )
        return rule

    @property
    def temperatures(self) -> tuple[float, float]:
        """Temperatures at times 1 and 0."""
        numbers = [float(number) for number in str(self.temperature).split(":")]
        return numbers[0], numbers[-1]

    def merge(self, **changes: Any) -> Self:
        """Return a checked copy with some options changed; None keeps an option as it is.

        `max_denoising_steps`, transformers' name, stands for `steps`. Another rule begins with its
        own default knobs.

        Raises:
            ConfigError: an unknown option, or a value of a wrong type or out of range.
        """
        wanted = _renamed({key: value for key, value in changes.items() if value is not None})
        fields = type(self).model_fields
        for name in wanted:
            if name not in fields:
                raise unknown("option", name, fields)
        if wanted.get("rule", self.rule) != self.rule:
            wanted.setdefault("knobs", {})
        try:
            return type(self).model_validate(dict(self) | wanted, strict=True)
        except ValidationError as error:
            raise refused_option(error) from None

    @classmethod
    def from_export(cls, content: Mapping[str, Any]) -> "SamplingConfig":
        """Return the options in a `generation_config.json`; other keys are ignored.

        Raises:
            CheckpointError: a value of a wrong type or out of range.
        """
        known = SamplingConfig.model_fields
        given = {key: value for key, value in _renamed(content).items() if key in known}
        try:
            return SamplingConfig(**{k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            raise refused_option(error, CheckpointError, "generation_config.json: ") from None

    def to_export(self) -> dict[str, Any]:
        """Return the content of a `generation_config.json`."""
        # Exports of earlier versions have neither key; a default one is left out.
        absent = {name for name in ("stop", "cache") if getattr(self, name) in ((), "auto")}
        dumped = self.model_dump(include=set(SamplingConfig.model_fields) - absent)
        return {{"steps": "max_denoising_steps"}.get(key, key): v for key, v in dumped.items()}


def _renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with `steps` under our name."""
    steps = options.get("steps", options.get("max_denoising_steps"))
    rest = {key: value for key, value in options.items() if key != "max_denoising_steps"}
    return rest if steps is None else rest | {"steps": steps}


def refused_option(
    refused: ValidationError, kind: type[TextDiffError] = ConfigError, where: str = ""
) -> TextDiffError:
    """Return an error that says in one sentence why an option was refused."""
    error = refused.errors(include_url=False)[0]
    context = {
        key: f"{value:.12g}" if isinstance(value, int | float) else value
        for key, value in error.get("ctx", {}).items()
    }
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    whole = dict.fromkeys(("int_type", "int_from_float", "int_parsing"), "give a whole number")
    reasons = whole | {
        "greater_than_equal": "give at least {ge}",
        "greater_than": "give more than {gt}",
        "less_than_equal": "give at most {le}",
        "literal_error": "give one of {expected}",
        "too_short": "an empty string; give at least one character",
        "string_too_short": "an empty string; give at least one character",
        "tuple_type": "give a text or a list of texts",
        "string_type": "give a text",
        "string_unicode": "it is not UTF-8 text, and no text can hold it",
        **dict.fromkeys(("value_error", "unknown_rule"), message),
    }
    reason = reasons.get(error["type"], f"give {message}").format(**context)
    name, *index = error["loc"] or ("options",)
    name = f"{name}[{index[0]}]" if index and isinstance(index[0], int) else name
    return kind(f"{where}{name} {error['input']!r:.60}: {reason}", code=error["type"])
