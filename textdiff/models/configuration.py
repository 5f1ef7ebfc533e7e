"""Configuration of the denoiser, and what tools of transformers expect of a masked language model.

The configuration is the `config.json` of an export; the rest is labels, options and resizing.
Shapes: B rows, L positions, N selected positions, V vocabulary.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

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
        self_conditioning: whether the network reads its own earlier prediction.
        rope_theta: base of the rotary frequencies.
        excluded_token_ids: ids besides the mask that are not clean tokens (never predicted).
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
    self_conditioning: bool = False
    rope_theta: float | int = 10000.0
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    excluded_token_ids: list[int] | None = None
    diffusion: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain data without options that are off and that earlier versions lack."""
        content = super().to_dict()
        if not content.get("self_conditioning"):
            content.pop("self_conditioning", None)
        return content

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.hidden_size // self.num_attention_heads


def initial_exponent(config: PreTrainedConfig) -> float | None:
    """Return the start of a learned schedule's exponents; None: it has no parameters."""
    schedule = (getattr(config, "diffusion", None) or {}).get("schedule", {})
    return schedule["exponent"] if schedule.get("kind") == "learned" else None


IGNORED = -100

# Arguments that other models take. A model without token types ignores them; what cannot be
# returned here is refused.
ACCEPTED = ("token_type_ids", "return_dict", "num_items_in_batch", "previous")
REFUSED = {
    "inputs_embeds": "give input_ids: the embeddings of this network are part of it",
    "output_hidden_states": "model.hidden(...) returns the last hidden states",
    "output_attentions": "attention probabilities are never held as a whole",
}


def check_options(options: dict[str, Any]) -> None:
    """Refuse what the network cannot do.

    Raises:
        ValueError: an option that other models have.
        TypeError: an unknown option.
    """
    for name, value in options.items():
        if name in REFUSED:
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported; {REFUSED[name]}")
        elif name not in ACCEPTED:
            raise TypeError(f"TextDiffusionModel.forward has no argument {name!r}")


def cross_entropy(
    logits: Tensor, labels: Tensor, positions: Tensor | None, items: Tensor | int | None
) -> Tensor:
    """Average -log p of the labels over the positions whose label is not -100.

    Args:
        logits: [B, L, V], or [N, V] at `positions`.
        labels: [B, L], or [N] at `positions`.
        positions: [N] flat indices into B * L, or None.
        items: labels of a whole accumulated batch, to divide by instead of this one's.

    Raises:
        ValueError: labels of another shape.
    """
    flat = labels.reshape(-1)
    if positions is not None and flat.shape != positions.shape:
        flat = flat[positions]
    rows = logits.reshape(-1, logits.shape[-1])
    if len(flat) != len(rows):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape "
            f"{tuple(logits.shape)}: give one label for each position, {IGNORED} where none is"
        )
    wide = rows.double() if rows.dtype == torch.float64 else rows.float()
    flat = flat.to(wide.device)
    total = functional.cross_entropy(wide, flat, ignore_index=IGNORED, reduction="sum")
    if items is None:
        items = (flat != IGNORED).sum().clamp(min=1)  # nothing to learn from is a loss of zero
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)


@torch.no_grad()
def resize(model: nn.Module, tokens: int, rows: int, like_others: bool) -> None:
    """Give a model's embedding, head and learned schedule another number of rows.

    Args:
        model: a `TextDiffusionModel`.
        tokens: ids that there are; those beyond are never predicted.
        rows: rows of the vocabulary, at least as many.
        like_others: new embeddings have the mean and deviation of the old ones, else unit normal.

    Raises:
        ValueError: a special token would be cut off.
    """
    config = model.config
    if rows == config.vocab_size:
        return
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = [config.mask_token_id, config.pad_token_id, *ends]
    least = 1 + max((id_ for id_ in special if id_ is not None), default=0)
    if tokens < least:
        raise ValueError(f"{tokens} tokens would cut off a special token; give at least {least}")
    embedding, head = model.vocab_embed, model.output_layer.linear
    table = embedding.embedding
    mean, deviation = (table.mean(0), table.std(0)) if like_others else (0.0, 1.0)
    drawn = torch.randn_like(table[:1].expand(max(0, rows - len(table)), -1)) * deviation + mean
    embedding.embedding = _resized(table, rows, drawn)
    head.weight = _resized(head.weight, rows, head.weight.mean(0))
    head.bias = _resized(head.bias, rows, head.bias.mean())
    head.out_features = rows
    if model.exponents is not None:
        model.exponents.raw = _resized(model.exponents.raw, rows, model.exponents.raw.mean())
    excluded = [id_ for id_ in config.excluded_token_ids or () if id_ < tokens]
    config.excluded_token_ids = [*excluded, *range(tokens, rows)]
    config.vocab_size = rows


def _resized(old: Tensor, rows: int, added: Tensor) -> nn.Parameter:
    """Return a parameter with the old rows, as far as they go, and added ones after them."""
    new = old.new_empty(rows, *old.shape[1:])
    kept = min(rows, len(old))
    new[:kept] = old[:kept]
    new[kept:] = added.to(new.dtype)
    return nn.Parameter(new, requires_grad=old.requires_grad)
