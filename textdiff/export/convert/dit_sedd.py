"""SEDD: score entropy under absorbing or uniform noise; as itself, or as masked diffusion."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

from textdiff.errors import ConfigError
from textdiff.export.convert.checkpoint_family import lookup
from textdiff.export.convert.dit import EPS, CommonDiT


class SEDDCheckpoint(CommonDiT):
    """Score entropy, absorbing or uniform.

    Where `scale_by_sigma` is true, and always in the container of BD3-LM, the outputs are scaled by
    the noise level outside the network.
    """

    kind: Literal["sedd"] = "sedd"

    ids: ClassVar[tuple[str, ...]] = (
        "louaaron/sedd-small",
        "louaaron/sedd-medium",
        "kuleshov-group/sedd-noeos-owt",
    )
    repository = "https://github.com/louaaron/Score-Entropy-Discrete-Diffusion"
    licence = "mit"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family."""
        scaled = lookup(config, "model.scale_by_sigma") if "graph" in config else True
        return {
            "process": "absorbing" if self.has_mask(config) else "uniform",
            "schedule": _schedule(config),
            "objective": {"kind": "sedd", "scaled": bool(scaled)},
        }

    def has_mask(self, config: Mapping[str, Any]) -> bool:
        """Return whether noise is absorbing."""
        return bool(lookup(config, "graph.type") != "uniform")


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedule; those of the BD3-LM repository end at 0."""
    if lookup(config, "graph.type") and lookup(config, "noise.type") == "geometric":
        ends = {name: float(lookup(config, f"noise.{name}")) for name in ("sigma_min", "sigma_max")}
        return {"kind": "geometric", **ends}
    return {"kind": "loglinear", "eps": EPS if "graph" in config else 0.0}


class SEDDAsMDLM(SEDDCheckpoint):
    """SEDD under absorbing noise, its scores normalised, as masked diffusion; only by name.

    Scores that add up to Z times what they should have an excess of Z - 1 - ln Z in the bound. So
    this bound is never above that of `sedd`, and equal where Z = 1.
    """

    kind: Literal["sedd-as-mdlm"] = "sedd-as-mdlm"  # type: ignore[assignment]

    ids = ()

    @classmethod
    def matches(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """Return False: the same checkpoints are recognised as `sedd`."""
        return False

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family of masked diffusion.

        Raises:
            ConfigError: noise is uniform.
        """
        if not self.has_mask(config):
            message = "family sedd-as-mdlm needs absorbing noise, this SEDD is uniform: take sedd"
            raise ConfigError(message, code="not_absorbing")
        return super().diffusion(config) | {"objective": {"kind": "mdlm"}}
