"""Registries: the classes that one choice is made from, by the names that users write.

A member is a section with a `kind`: its fields are its options, its docstring's first line is its
summary, its validators are its refusals. Schema, flags, help and error messages read registries.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, SerializationInfo, ValidationError
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from textdiff.errors import ConfigError, closest, unknown
from textdiff.section import Section

M = TypeVar("M", bound=Section)


class Registry(Mapping[str, type[M]], Generic[M]):
    """Classes by their `kind`, in the order of their registration.

    Args:
        noun: what a member is called in messages, such as "schedule".
        members: the classes that textdiff itself has.
    """

    def __init__(self, noun: str, members: Iterable[type[M]] = ()):
        self.noun = noun
        self._members: dict[str, type[M]] = {}
        for member in members:
            self.register(member)

    def register(self, member: type[M]) -> type[M]:
        """Add a class; may decorate it.

        Raises:
            ValueError: the class has no `kind`, or another class has the same one.
        """
        field = member.model_fields.get("kind")
        if field is None or not isinstance(field.default, str):
            raise ValueError(f'{member.__name__} needs a field kind: Literal["NAME"] = "NAME"')
        if self._members.get(field.default, member) is not member:
            raise ValueError(f"there is another {self.noun} {field.default!r}")
        self._members[field.default] = member
        return member

    def __getitem__(self, kind: str) -> type[M]:
        return self._members[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def build(self, kind: str, options: Mapping[str, Any] | None = None) -> M:
        """Return a member with some options set.

        Raises:
            ConfigError: unknown kind or option, or a value that the member refuses.
        """
        if kind not in self:
            raise unknown(self.noun, kind, self)
        try:
            return self[kind].model_validate(dict(options or {}))
        except ValidationError as error:
            raise ConfigError(
                f"{self.noun} {kind}: {self._reason(kind, error)}", code=error.errors()[0]["type"]
            ) from None

    def _reason(self, kind: str, error: ValidationError) -> str:
        """Say what is wrong with the first option that was refused."""
        item = error.errors(include_url=False)[0]
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden" and name:
            known = [field for field in self[kind].model_fields if field != "kind"]
            return f"no option {name!r}; " + (closest(name, known) if known else "it has none")
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{name} {item['input']!r} {message}" if name else message

    def parse(self, value: Any, default: str | None = None) -> M:
        """Return a member from plain data that names its `kind`; for pydantic.

        Args:
            value: a member, or its keys.
            default: kind of data that names none; None: they are refused.

        Raises:
            PydanticKnownError: no section, no kind or an unknown one.
            ValidationError: the member refuses its options.
        """
        for member in self._members.values():
            if isinstance(value, member):
                return value
        if not isinstance(value, Mapping):
            raise PydanticKnownError("model_attributes_type")
        kind = value.get("kind", default)
        if kind is None and "kind" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        if kind not in self:
            expected = ", ".join(repr(name) for name in self)
            raise PydanticKnownError(
                "union_tag_invalid",
                {"discriminator": "'kind'", "tag": str(kind), "expected_tags": expected},
            )
        return self[kind].model_validate(value)


@dataclass(frozen=True)
class OneOf:
    """Annotation of a key that holds one member: `Annotated[NoiseSchedule, OneOf(SCHEDULES)]`.

    Members that are registered later are accepted without another word.

    Attributes:
        registry: the members.
        default: kind of a section that names none; None: it must name one.
    """

    registry: Registry[Any]
    default: str | None = None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        parse: Callable[[Any], Any] = partial(self.registry.parse, default=self.default)
        return core_schema.no_info_plain_validator_function(
            parse,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )


@dataclass(frozen=True)
class NameOf:
    """Annotation of a key that holds one of several names: `Annotated[str, NameOf(PROCESSES)]`.

    Names that are added later are accepted without another word.
    """

    names: Collection[str]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._known)

    def _known(self, value: Any) -> str:
        if isinstance(value, str) and value in self.names:
            return value
        *others, last = map(repr, self.names)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticKnownError("literal_error", {"expected": expected})


def _dump(member: Section, info: SerializationInfo) -> dict[str, Any]:
    return member.model_dump(mode=info.mode, exclude_unset=info.exclude_unset)
