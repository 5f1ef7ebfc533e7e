"""Objectives by the names that configs use; one file each."""

from typing import Any

from textdiff.diffusion.objectives.d3pm import D3PMAbsorbing, D3PMUniform
from textdiff.diffusion.objectives.genmd4 import GenMD4
from textdiff.diffusion.objectives.gidd import GIDD
from textdiff.diffusion.objectives.mdlm import AR, MDLM
from textdiff.diffusion.objectives.objective import Objective, Prediction
from textdiff.diffusion.objectives.sedd import SEDDAbsorbing, SEDDUniform
from textdiff.diffusion.objectives.udlm import UDLM
from textdiff.diffusion.process import ForwardProcess

OBJECTIVES: dict[str, tuple[type[Objective], ...]] = {
    "mdlm": (MDLM, GenMD4),
    "d3pm": (D3PMAbsorbing, D3PMUniform),
    "sedd": (SEDDAbsorbing, SEDDUniform),
    "udlm": (UDLM,),
    "gidd": (GIDD,),
    "ar": (AR,),
}
"""Each name's implementations, one for every process it is defined for."""


def build_objective(process: ForwardProcess, kind: str, **options: Any) -> Objective:
    """The objective that a config's `diffusion.objective` names, for one process.

    Raises:
        ValueError: the objective is not defined for the process.
    """
    for implementation in OBJECTIVES[kind]:
        if process.name in implementation.processes:
            return implementation(process, **options)
    names = [name for found in OBJECTIVES[kind] for name in found.processes]
    raise ValueError(f"objective {kind} is defined for {' and '.join(names)} noise only")


__all__ = [
    "AR",
    "GIDD",
    "MDLM",
    "OBJECTIVES",
    "UDLM",
    "D3PMAbsorbing",
    "D3PMUniform",
    "GenMD4",
    "Objective",
    "Prediction",
    "SEDDAbsorbing",
    "SEDDUniform",
    "build_objective",
]
