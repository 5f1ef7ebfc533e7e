"""The left-to-right baselines of the MDLM and BD3-LM repositories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from textdiff.export.convert.dit import CommonDiT

END = 50256
"""GPT-2's end-of-text token, with which the texts of these models begin."""


class ARCheckpoint(CommonDiT):
    """Left-to-right baselines of MDLM and BD3-LM: causal, no noise level."""

    kind: Literal["ar"] = "ar"

    ids = ("kuleshov-group/ar-noeos-owt",)
    repository = "https://github.com/kuleshov-group/bd3lms"
    licence = "apache-2.0"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family."""
        return {
            "process": "absorbing",
            "schedule": {"kind": "loglinear", "eps": 0.0},
            "objective": {
                "kind": "ar",
                "start": END if config.get("vocab_size") == END + 2 else None,
            },
            "block_size": 1,
        }
