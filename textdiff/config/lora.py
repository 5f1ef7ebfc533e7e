"""Section of low-rank adapters, which are trained instead of a network's weights."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field

from textdiff.section import Number, Section, Whole

ALL_LINEAR: Final = "all-linear"


def _listed(value: Any) -> Any:
    """Return one name as the list that holds it."""
    return (value,) if isinstance(value, str) and value != ALL_LINEAR else value


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class LoraConfig(Section):
    """Low-rank adapters W + (alpha / rank) B A (Eq. 3, arXiv:2106.09685), by the library peft."""

    rank: Whole = Field(16, ge=1, description="rows of A and columns of B")
    alpha: Number = Field(32.0, gt=0.0, description="alpha / rank scales what adapters add")
    dropout: Number = Field(0.0, ge=0.0, lt=1.0, description="dropout on the input of A")
    targets: Annotated[Literal["all-linear"] | Names, BeforeValidator(_listed)] = Field(
        ALL_LINEAR,
        description="linear layers that get adapters, by the ends of their names, or all-linear: "
        "all but the head",
    )
    base_bits: Literal[4] | None = Field(
        None, description="bits of frozen weights, by bitsandbytes on a GPU; null: float32"
    )
    merge: bool = Field(
        True,
        description="exports hold merged weights; false: adapters beside a reference to their base",
    )
