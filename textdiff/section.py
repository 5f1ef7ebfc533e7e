"""Sections: frozen groups of checked keys, the form of everything that a user may set.

Imports neither torch nor anything of textdiff, so that help and refusals stay quick.
"""

import os
from typing import Annotated, Any

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
