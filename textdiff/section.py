"""Sections: frozen groups of checked keys, the form of everything that a user may set.

Objectives, schedules, rules and estimators are sections, whose mathematics needs torch. Its import
takes seconds, for which `--help` and refusals must not wait: `from textdiff.section import Tensor,
torch` imports it at its first use. Such files delay the evaluation of annotations, in which alone
`Tensor` may stand, and base no class on one of torch's.
"""

import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticKnownError


class Section(BaseModel):
    """A frozen group of keys; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring."""
        return (cls.__doc__ or "").partition("\n")[0]


def _counted(value: Any) -> Any:
    """Refuse true and false, which Python counts as 1 and 0; YAML reads yes, no, on and off so."""
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


Whole = Annotated[int, BeforeValidator(_counted)]
Number = Annotated[float, BeforeValidator(_counted)]


def expanded(path: str) -> str:
    """Return a path with the home folder in place of `~`, as a shell would."""
    if not path.strip():
        raise ValueError("it is blank; give a path")
    if "\0" in path:
        raise ValueError("it holds a zero character, which no path can have")
    if not path.startswith("~"):
        return path
    full = os.path.expanduser(path)
    if full.startswith("~") and not os.path.exists(path):
        raise ValueError(f"{path}: unknown user; write ./{path} if that is a name")
    return full


PathText = Annotated[str, AfterValidator(expanded)]


class LazyModule(ModuleType):
    """A module that is imported when one of its attributes is first read."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, value)  # later reads find it without this function
        return value


if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
else:
    torch, Tensor = LazyModule("torch"), Any
