"""Registries: members by name, their refusals, and keys of a section that hold a member."""

import sys
from typing import Annotated, Literal

import pytest
from children import finished
from pydantic import Field, ValidationError

from textdiff.errors import ConfigError, unknown
from textdiff.registry import NameOf, OneOf, Registry
from textdiff.section import Section


class Shape(Section):
    kind: str


class Square(Shape):
    """A square."""

    kind: Literal["square"] = "square"
    side: float = Field(1.0, gt=0.0)


class Circle(Shape):
    """A circle."""

    kind: Literal["circle"] = "circle"


def drawing():
    shapes = Registry[Shape]("shape", [Square])

    class Drawing(Section):
        shape: Annotated[Shape, OneOf(shapes)] = Square()

    return shapes, Drawing


def test_build_checks_kind_options_and_values():
    shapes = Registry[Shape]("shape", [Square, Circle])
    assert shapes.build("square", {"side": 2}) == Square(side=2.0)
    assert list(shapes) == ["square", "circle"]
    for kind, options, code in [
        ("sqare", {}, "unknown_shape"),
        ("square", {"sid": 1}, "extra_forbidden"),
        ("circle", {"sid": 1}, "extra_forbidden"),
        ("square", {"side": -1}, "greater_than"),
        ("square", {"side": float("nan")}, "finite_number"),
    ]:
        with pytest.raises(ConfigError) as error:
            shapes.build(kind, options)
        assert error.value.code == code


def test_a_member_registered_after_the_schema_was_made_is_accepted():
    shapes, drawing_class = drawing()
    with pytest.raises(ValidationError) as error:
        drawing_class.model_validate({"shape": {"kind": "circle"}})
    assert error.value.errors()[0]["type"] == "union_tag_invalid"
    shapes.register(Circle)
    assert drawing_class.model_validate({"shape": {"kind": "circle"}}).shape == Circle()


def test_refusals_of_a_member_are_located_within_the_key():
    _, drawing_class = drawing()
    with pytest.raises(ValidationError) as error:
        drawing_class.model_validate({"shape": {"kind": "square", "side": 0, "s": 1}})
    assert {item["loc"] for item in error.value.errors()} == {("shape", "side"), ("shape", "s")}


def test_plain_data_round_trips():
    _, drawing_class = drawing()
    plain = drawing_class.model_validate({"shape": {"kind": "square", "side": 3}}).model_dump()
    assert plain == {"shape": {"kind": "square", "side": 3.0}}
    assert drawing_class.model_validate(plain).shape == Square(side=3.0)


def test_two_members_of_one_kind_are_refused():
    class Other(Shape):
        kind: Literal["square"] = "square"

    with pytest.raises(ValueError, match="another shape"):
        Registry[Shape]("shape", [Square, Other])


def test_lazy_torch_is_imported_at_its_first_use():
    code = (
        "import sys; from textdiff.section import torch; assert 'torch' not in sys.modules; "
        "assert torch.arange(3).sum() == 3; import torch as real; assert torch.where is real.where"
    )
    assert finished([sys.executable, "-c", code]).returncode == 0


def test_a_key_that_holds_a_name_accepts_names_that_are_added_later():
    names = {"count": 1, "time": 2}

    class Noise(Section):
        draw: Annotated[str, NameOf(names)] = "count"

    for wrong in ("step", 3, None, ["count"]):
        with pytest.raises(ValidationError) as error:
            Noise.model_validate({"draw": wrong})
        assert error.value.errors()[0]["type"] == "literal_error"
    names["step"] = 3
    assert Noise.model_validate({"draw": "step"}).model_dump() == {"draw": "step"}


def test_an_unknown_name_is_answered_with_all_and_the_nearest():
    error = unknown("shape", "sqare", ["square", "circle"])
    assert error.code == "unknown_shape"
    assert "did you mean 'square'?" in str(error)
    assert "square, circle" in str(error)
