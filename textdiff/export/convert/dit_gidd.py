"""GIDD: masks and uniform noise at once; its network reads time, not the noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from textdiff.export.convert.dit import CommonDiT

LEAST = math.exp(-20.0)
"""Smallest share of uniform noise in the official code, which stands for none."""


class GIDDCheckpoint(CommonDiT):
    """Masks and uniform noise at once."""

    kind: Literal["gidd"] = "gidd"

    ids = tuple(
        f"dvruette/gidd-{size}-p_unif-{share}"
        for size in ("small", "base")
        for share in ("0.0", "0.1", "0.2")
    )
    repository = "https://github.com/dvruette/gidd"
    licence = "mit"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family."""
        share = float(self.setting(config, "p_uniform"))
        return {
            "process": "hybrid",
            "schedule": {"kind": "hybrid", "uniform": max(share, LEAST)},
            "objective": {"kind": "gidd", "loss_weight": "released"},
            "time_input": "time",
        }
