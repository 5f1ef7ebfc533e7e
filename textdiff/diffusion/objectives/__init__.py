"""Objectives by the names that configs use; one class each."""

from textdiff.diffusion.objectives.d3pm import D3PM
from textdiff.diffusion.objectives.mdlm import AR, MDLM
from textdiff.diffusion.objectives.objective import Objective, Prediction
from textdiff.diffusion.objectives.plugged import GIDD, UDLM
from textdiff.diffusion.objectives.sedd import SEDD
from textdiff.registry import Registry

OBJECTIVES = Registry[Objective]("objective", [MDLM, D3PM, SEDD, UDLM, GIDD, AR])

__all__ = ["MDLM", "OBJECTIVES", "Objective", "Prediction"]
