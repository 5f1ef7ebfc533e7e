"""Our attention behind the networks of transformers.

transformers looks attention functions up by name. Ours is registered as `textdiff` and receives
queries, keys and values after rotation. The attention of one forward pass (layout, documents,
cache) reaches it as one more keyword argument, which models hand down to their layers. No model
code is changed or copied.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from .attention import Attention, attend
from .sliding_window import windowed

NAME = "textdiff"
"""Our attention function's name, and the keyword under which layers hand the attention down."""

# Arguments that change attention in ways that no layout expresses, by the models' own names.
INEXACT = {
    "softcap": "caps its attention scores",
    "s_aux": "has attention sinks",
    "position_bias": "adds a position bias to its attention scores",
}


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as the forward pass prepared it.

    Args:
        module: the attention module.
        query: [B, heads, T, D].
        key: [B, key/value heads, T, D].
        value: likewise.
        attention_mask: None; masks come from the layout.
        scaling: factor of the scores; None: 1 / sqrt(D).
        **options: `textdiff`, the prepared attention; and `sliding_window`.

    Returns:
        [B, T, heads, D].

    Raises:
        ValueError: the network was called directly, or attends in a way that is not exact here.
    """
    attention = _prepared(module, options)
    _check(module, options)
    window = options.get("sliding_window")
    if not isinstance(attention, Attention):  # a probe, which records calls
        return attention(module, query, key, value, window).transpose(1, 2), None
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)
    if window is not None:
        attention = windowed(attention, window, not module.textdiff_causal)
    # Under autocast norms after the projections leave float32 queries and keys. Dropout is off.
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(attention, query, key, value, module.textdiff_layer)
    return out.transpose(1, 2), None


def _prepared(module: nn.Module, options: dict[str, Any]) -> Any:
    """Return the attention that the forward pass handed down."""
    if options.get(NAME) is None:
        raise ValueError(
            f"{type(module).__name__} received no layout: call the denoiser, not its network; "
            "networks that hand no keyword arguments down to their attention are not supported"
        )
    return options[NAME]


def _check(module: nn.Module, options: dict[str, Any]) -> None:
    """Refuse attention that no layout expresses."""
    for name, reason in INEXACT.items():
        if options.get(name) is not None:
            raise ValueError(f"{type(module).__name__} {reason}, which is not supported")


AttentionInterface.register(NAME, attention_function)
