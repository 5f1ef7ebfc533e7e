"""Objectives by the names that configs use."""

from typing import Any

from textdiff.diffusion.objectives.mdlm import MDLM
from textdiff.diffusion.objectives.objective import Objective, Prediction
from textdiff.diffusion.process import Vocabulary

OBJECTIVES: dict[str, type[MDLM]] = {"mdlm": MDLM}


def build_objective(vocabulary: Vocabulary, kind: str, **options: Any) -> Objective:
    """The objective that a config's `diffusion.objective` names."""
    return OBJECTIVES[kind](vocabulary, **options)


__all__ = ["MDLM", "OBJECTIVES", "Objective", "Prediction", "build_objective"]
