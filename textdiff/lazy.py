"""torch, imported at its first use: `from textdiff.lazy import Tensor, torch`.

The schema of a config reads objectives, schedules, rules and estimators for their options. Their
mathematics needs torch, whose import takes seconds, and `--help` must not wait for it. Such files
delay the evaluation of annotations, in which alone `Tensor` may stand, and base no class on one of
torch's.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


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
