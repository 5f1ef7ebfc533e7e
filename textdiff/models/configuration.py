"""Configuration of the denoiser, as `config.json` of an export holds it."""

from typing import Any

import transformers

NEEDED = (5, 10)
"""The oldest transformers that loads a checkpoint's code: it copies all of it, not the first file's
imports alone."""

if tuple(map(int, transformers.__version__.split(".")[:2])) < NEEDED:
    # Older ones lack what is imported below; this module is the first that they run.
    wanted = ".".join(map(str, NEEDED))
    raise ImportError(
        f"this textdiff model needs transformers {wanted} or newer, and {transformers.__version__} "
        f'is installed; upgrade it: pip install -U "transformers>={wanted}"'
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import PreTrainedConfig  # noqa: E402


@strict
class TextDiffusionConfig(PreTrainedConfig):
    """Architecture of a denoiser, its special ids, and the diffusion family it was trained for.

    Attributes:
        vocab_size: rows of embedding and head, one per tokenizer id.
        hidden_size: width of the residual stream.
        num_hidden_layers: Transformer blocks.
        num_attention_heads: heads of hidden_size / num_attention_heads channels.
        max_position_embeddings: sequence length in tokens that the network was trained at.
        mlp: `gelu` (4x wide, biases) or `swiglu` (8/3x wide, no biases).
        norm: `layernorm` (weight, no bias) or `rmsnorm`.
        qk_norm: RMS-normalise queries and keys per head.
        dropout: dropout probability on both residual branches.
        adaln: modulate norms and branches by the noise level.
        time_conditioning: whether the true noise level enters (else adaln always sees sigma = 0).
        conditioning_size: width of the noise-level embedding.
        rope_theta: base of the rotary frequencies.
        excluded_token_ids: ids besides the mask that are no clean token (never predicted).
        diffusion: process, schedule, objective and block size as plain data.
    """

    model_type = "textdiff"

    vocab_size: int = 260
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    mlp: str = "gelu"
    norm: str = "layernorm"
    qk_norm: bool = False
    dropout: float | int = 0.0
    adaln: bool = False
    time_conditioning: bool = False
    conditioning_size: int = 128
    rope_theta: float | int = 10000.0
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    excluded_token_ids: list[int] | None = None
    diffusion: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    @property
    def initial_exponent(self) -> float | None:
        """Where a learned schedule's exponents start; None: the schedule has no parameters."""
        schedule = (self.diffusion or {}).get("schedule", {})
        return schedule["exponent"] if schedule.get("kind") == "learned" else None

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads
