"""UDLM and Duo: uniform noise on all rows; a row for the mask is appended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from textdiff.export.convert.checkpoint_family import lookup
from textdiff.export.convert.dit import EPS, CommonDiT


class _UniformDiT(CommonDiT):
    """Uniform noise over every row of the embedding, special tokens included."""

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family."""
        return {
            "process": "uniform",
            "schedule": {"kind": "loglinear", "eps": EPS},
            "objective": {"kind": "udlm"},
        }

    def has_mask(self, config: Mapping[str, Any]) -> bool:
        """Return False: noise replaces tokens."""
        return False


class UDLMCheckpoint(_UniformDiT):
    """Uniform noise; not its class-conditional models."""

    kind: Literal["udlm"] = "udlm"

    ids = ("kuleshov-group/udlm-lm1b",)
    repository = "https://github.com/kuleshov-group/discrete-diffusion-guidance"
    licence = "apache-2.0"

    def reads_time(self, config: Mapping[str, Any]) -> bool:
        """Return whether time conditioning is on."""
        return lookup(config, "time_conditioning") is not False


class DuoCheckpoint(_UniformDiT):
    """Uniform noise, trained by way of Gaussian diffusion."""

    kind: Literal["duo"] = "duo"

    ids = ("s-sahoo/duo", "s-sahoo/duo-distilled")
    repository = "https://github.com/s-sahoo/duo"
    licence = "apache-2.0"
