"""Attention backends by their transformers names, all reading the same `Layout`.

`prepare` turns a layout into what a backend needs once per forward pass; `attend` runs once per
layer on queries, keys and values [B, H, T, D]. `eager` is the reference. `sdpa` on a CPU is torch's
flash kernel, but in half precision with a backward pass of our own, which takes half the time; two
streams go chunk by chunk. There may be fewer queries than keys: then they are the first ones.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cache import CacheSlice
from .compilation import refuse_fallbacks
from .cpu_block_attention import block_attention
from .cpu_kernels import applies, half_attention
from .flash import flash_attention, runs, segments, unsupported
from .layout import Layout


@dataclass(frozen=True)
class Attention:
    """Backend with the mask of one forward pass.

    Attributes:
        backend: its name.
        mask: boolean, [T, T] or [B, 1, T, T], or FlexAttention's block mask, or FlashAttention's
            segments; None: dense.
        causal: whether the backend masks the future by itself.
        noisy: FlexAttention's block mask for the first stream's queries alone.
        streams: the layout of two streams that are attended chunk by chunk.
        length: L where two streams are attended one after the other.
        cache: keys and values of earlier tokens.
        layout: who sees whom, for layers that narrow it.
        total: positions, both streams counted.
        device: of the inputs.
        narrowed: attention of layers with a sliding window, by its length; made when first asked.
    """

    backend: str
    mask: Any = None
    causal: bool = False
    noisy: Any = None
    streams: Layout | None = None
    length: int | None = None
    cache: CacheSlice | None = None
    layout: Layout | None = None
    total: int = 0
    device: torch.device | None = None
    narrowed: dict[int, "Attention"] = field(default_factory=dict)


def unavailable(backend: str, device: torch.device, gradients: bool) -> str | None:
    """Return why a backend cannot run here, as a sentence; None when it can."""
    if backend not in BACKENDS:
        return f"unknown attention backend {backend!r}; one of {', '.join(BACKENDS)}"
    if backend == "flex_attention" and device.type == "cpu" and gradients:
        return "flex_attention cannot train on a CPU (no backward pass there); use sdpa"
    if backend == "flex_attention" and device.type == "cuda" and not find_spec("triton"):
        return "flex_attention is compiled by triton, which is not installed; use sdpa"
    if backend == "flash_attention_2":
        return unsupported(device)
    return None


def prepare(
    backend: str,
    layout: Layout,
    total: int,
    device: torch.device,
    batch: int,
    cache: CacheSlice | None = None,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Attention:
    """Build the mask of one forward pass; arguments as for `_prepare`."""
    attention = _prepare(backend, layout, total, device, batch, cache, compiled, dtype)
    return replace(attention, layout=layout, total=total, device=device)


def _prepare(
    backend: str,
    layout: Layout,
    total: int,
    device: torch.device,
    batch: int,
    cache: CacheSlice | None,
    compiled: bool,
    dtype: torch.dtype,
) -> Attention:
    """Build the mask of one forward pass.

    Args:
        backend: its name.
        layout: which positions see which.
        total: positions, both streams counted.
        device: of the inputs.
        batch: rows.
        cache: keys and values of earlier tokens.
        compiled: whether the blocks are compiled, which needs plain torch operations.
        dtype: of queries, keys and values.

    Raises:
        ValueError: the backend cannot run the layout.
    """
    if cache is not None:  # few queries with a mask of their own
        return Attention("eager" if backend == "eager" else "sdpa", cache.mask, cache=cache)
    backend = _applied(backend, layout, device, dtype)
    if backend == "flash_attention_2":
        return Attention(backend, segments(layout, total), causal=layout.kind == "causal")
    if backend == "flex_attention":
        return _for_flex(layout, total, device, batch)
    if backend == "sdpa" and device.type != "cpu" and _is_causal(layout):
        return Attention(backend, causal=True)  # kernels then skip the future
    if backend == "sdpa" and layout.streams == 2:
        length = total // 2
        if device.type == "cpu" and not compiled:
            return Attention(backend, streams=layout)
        return Attention(backend, layout.mask(total, device), length=length)
    return Attention(backend, layout.mask(total, device))


def _is_causal(layout: Layout) -> bool:
    """Return whether tokens see all before them, whatever the document."""
    return layout.kind == "causal" and layout.document_ids is None


def _applied(backend: str, layout: Layout, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend of a call: SDPA where there is nothing for the other one to skip or save.

    Without gradients, lengths differ from call to call: FlexAttention would be compiled for each.
    """
    if backend == "flex_attention":
        varies = device.type != "cpu" and not torch.is_grad_enabled()
        return "sdpa" if layout.is_dense or varies else backend
    if backend == "flash_attention_2" and not runs(layout, dtype):
        return "sdpa"
    return backend


def _for_flex(layout: Layout, total: int, device: torch.device, batch: int) -> Attention:
    if layout.document_ids is None and layout.finished is None:
        return _common_flex(layout.kind, layout.block_size, layout.causal_context, total, device)
    return _flex_masks(layout, total, device, batch)


@lru_cache(maxsize=16)
def _common_flex(
    kind: str, block_size: int | None, causal_context: bool, total: int, device: torch.device
) -> Attention:
    """Return the block masks of a layout that all rows share, the same ones for every call."""
    layout = Layout(kind, block_size, causal_context=causal_context)
    return _flex_masks(layout, total, device, None)


def _flex_masks(layout: Layout, total: int, device: torch.device, rows: int | None) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    rule = layout.mask_mod(total)
    mask = create_block_mask(rule, rows, None, total, total, device=device)
    if layout.streams == 1:
        return Attention("flex_attention", mask)
    noisy = create_block_mask(rule, rows, None, total // 2, total, device=device)
    return Attention("flex_attention", mask, noisy=noisy)


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
        queries, keys = cache.positions.view(-1, total, 1), cache.held.unsqueeze(1)
        device = cache.store.device
        mask = cache.mask
    else:
        if total // layout.streams <= window:
            return attention
        at = torch.arange(total // layout.streams).repeat(layout.streams)
        queries, keys = at[None, :, None], at[None, None, :]
        device = attention.device
        dense = attention.backend in ("eager", "sdpa") and attention.streams is None
        dense = dense and not attention.causal
        mask = attention.mask if dense else layout.mask(total, device)
    near = queries - keys < window  # [B or 1, T, keys]
    if both_sides:
        near &= keys - queries < window
    near = near.unsqueeze(1).to(device)
    near = near if mask is None else near & mask
    return Attention("eager" if attention.backend == "eager" else "sdpa", near, cache=cache)


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v under the prepared mask, [B, H, T, D].

    Args:
        attention: the backend and its mask.
        q: [B, H, T, D] queries.
        k: keys, of as many heads or of some that several queries share.
        v: values, likewise.
        layer: index of the layer in a cache.
    """
    if attention.cache is not None:
        k, v = attention.cache.exchange(layer, k, v)
    groups = k.shape[1] != q.shape[1]  # grouped queries (arXiv:2305.13245)
    if groups and attention.backend != "flash_attention_2":
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return BACKENDS[attention.backend](attention, q, k, v)


def _eager(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
    if attention.mask is not None:
        mask = attention.mask[..., : q.shape[2], :]
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


def _sdpa(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if attention.streams is not None:
        return block_attention(q, k, v, attention.streams)
    if attention.length is not None:
        return _stream_by_stream(attention, q, k, v, attention.length)
    if q.dtype in (torch.bfloat16, torch.float16) and q.requires_grad and applies(q):
        return half_attention(q, k, v, attention.mask)
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attention.mask, is_causal=attention.causal
    )


def _stream_by_stream(attention: Attention, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """Attend two streams in two calls: the clean one never sees the noisy one."""
    scaled = functional.scaled_dot_product_attention
    noisy, clean = slice(None, length), slice(length, None)
    mask = attention.mask
    out = scaled(q[:, :, noisy], k, v, attn_mask=mask[..., noisy, :])
    if q.shape[2] == length:
        return out
    rest = scaled(q[:, :, clean], k[:, :, clean], v[:, :, clean], attn_mask=mask[..., clean, clean])
    return torch.cat([out, rest], dim=2)


def _flex(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = attention.mask if q.shape[2] == k.shape[2] else attention.noisy
    return _flex_attention(q.device.type)(q, k, v, block_mask=mask)


@cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled on a GPU, or it would hold every score."""
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cpu":
        return flex_attention
    refuse_fallbacks()
    return torch.compile(flex_attention)


def _flash(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(q, k, v, attention.causal, attention.mask)


BACKENDS = {"eager": _eager, "sdpa": _sdpa}
BACKENDS |= {"flex_attention": _flex, "flash_attention_2": _flash}
