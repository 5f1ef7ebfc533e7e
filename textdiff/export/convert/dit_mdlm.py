"""MDLM and what is distilled from it (SDTT, DiDi-Instruct)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from textdiff.export.convert.checkpoint_family import lookup
from textdiff.export.convert.dit import EPS, CommonDiT


class MDLMCheckpoint(CommonDiT):
    """Masked diffusion on whole sequences, and models distilled from it.

    Runs with the parameterisation `d3pm` may predict the mask; they are read as the objective
    `d3pm`.
    """

    kind: Literal["mdlm"] = "mdlm"

    ids = (
        "kuleshov-group/mdlm-owt",
        "kuleshov-group/mdlm-no_flashattn-fp32-owt",
        "kuleshov-group/mdlm-noeos-owt",
        "jdeschena/sdtt",
        "haoyangzheng/didi-instruct-small",
    )
    repository = "https://github.com/kuleshov-group/mdlm"
    licence = "apache-2.0"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family; schedules of the BD3-LM repository end at 0."""
        blocks = config.get("model_type") in ("bd3lm", "bamdlm") or "algo" in config
        plugged = lookup(config, "parameterization", "algo.parameterization") == "d3pm"
        mixed = {"kind": "d3pm", "parameterization": "plugged"}
        return {
            "process": "absorbing",
            "schedule": {"kind": "loglinear", "eps": 0.0 if blocks else EPS},
            "objective": mixed if plugged else {"kind": "mdlm"},
            "timesteps": (lookup(config, "T", "algo.T") or 1000) if plugged else None,
        }

    def reads_time(self, config: Mapping[str, Any]) -> bool:
        """Return whether time conditioning is on: mostly off, and zeros are read."""
        return bool(lookup(config, "time_conditioning", "algo.time_conditioning"))
