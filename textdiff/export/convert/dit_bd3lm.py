"""BD3-LM: masked diffusion in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from textdiff.export.convert.dit import LENGTHS, CommonDiT


class BD3LMCheckpoint(CommonDiT):
    """Masked diffusion in blocks, and its pretraining on whole sequences."""

    kind: Literal["bd3lm"] = "bd3lm"

    ids = (
        "kuleshov-group/bd3lm-owt-block_size4",
        "kuleshov-group/bd3lm-owt-block_size8",
        "kuleshov-group/bd3lm-owt-block_size16",
        "kuleshov-group/bd3lm-owt-block_size1024-pretrain",
    )
    repository = "https://github.com/kuleshov-group/bd3lms"
    licence = "apache-2.0"

    def diffusion(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the family; a block as long as the sequence is the sequence."""
        size, length = int(self.setting(config, "block_size")), int(self.setting(config, *LENGTHS))
        return {
            "process": "absorbing",
            "schedule": {"kind": "loglinear", "eps": 0.0},
            "objective": {"kind": "mdlm"},
            "block_size": size if size < length else None,
        }

    def reads_time(self, config: Mapping[str, Any]) -> bool:
        """Return False: the official code feeds zeros, whatever the config says."""
        return False
