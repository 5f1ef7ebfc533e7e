"""What transformers' own tools expect of a masked language model: labels, options, resizing.

Shapes: B rows, L positions, N selected positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100

# Arguments that other models take. A model without token types ignores them; what cannot be
# returned here is refused.
ACCEPTED = ("token_type_ids", "return_dict", "num_items_in_batch")
REFUSED = {
    "inputs_embeds": "give input_ids: the embeddings of this network are part of it",
    "output_hidden_states": "model.hidden(...) returns the last hidden states",
    "output_attentions": "attention probabilities are never held as a whole",
}


def check_options(options: dict[str, Any]) -> None:
    """Refuse what the network cannot do.

    Raises:
        ValueError: an option that other models have.
        TypeError: an option that nobody knows.
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
