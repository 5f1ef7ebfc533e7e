"""Configuration of a model in SDAR's layout; this file is copied beside its weights."""

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):  # type: ignore[misc]
    """Qwen3's configuration under the name that servers of SDAR models know."""

    model_type = "sdar"

    def __init__(self, rope_theta: float = 1e6, **options: Any):
        super().__init__(rope_theta=rope_theta, **options)
        # Servers read it here, and newer versions of transformers keep it elsewhere.
        self.rope_theta = rope_theta
