"""Attention of layers with a sliding window, in networks of transformers."""

import torch

from .attention import Attention


def windowed(attention: Attention, window: int, both_sides: bool) -> Attention:
    """Return attention to nearer positions alone, for a layer with a sliding window.

    Args:
        attention: that of layers without one.
        window: query i sees key j only if i - j < window.
        both_sides: and only if j - i < window.
    """
    if window not in attention.narrowed:
        attention.narrowed[window] = _narrow(attention, window, both_sides)
    return attention.narrowed[window]


def _narrow(attention: Attention, window: int, both_sides: bool) -> Attention:
    cache, layout, total = attention.cache, attention.layout, attention.total
    assert layout is not None
    if cache is not None:
        if cache.width <= window:
            return attention
        queries, keys = cache.positions.view(-1, 1, total, 1), cache.held[:, None, None]
        device = cache.store.device
        mask = cache.mask
    else:
        if total // layout.streams <= window:
            return attention
        at = torch.arange(total // layout.streams).repeat(layout.streams)
        queries, keys = at[:, None], at[None, :]
        device = attention.device
        dense = attention.backend in ("eager", "sdpa") and attention.streams is None
        dense = dense and not attention.causal
        mask = attention.mask if dense else layout.mask(total, device)
    near = queries - keys < window  # [T, keys], or [B, 1, T, keys] with a cache
    if both_sides:
        near &= keys - queries < window
    near = near.to(device)
    near = near if mask is None else near & mask
    return Attention("eager" if attention.backend == "eager" else "sdpa", near, cache=cache)
