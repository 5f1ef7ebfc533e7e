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
from .cpu_block_attention import block_attention
from .cpu_kernels import applies, half_attention
from .devices import refuse_fallbacks
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
        clean: attention of the second stream alone, where another backend serves it.
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
    clean: "Attention | None" = None
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
    tokens: Tensor,
    cache: CacheSlice | None = None,
    compiled: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Attention:
    """Build the mask of one forward pass; arguments as for `_prepare`."""
    attention = _prepare(backend, layout, tokens, cache, compiled, dtype)
    return replace(attention, layout=layout, total=tokens.shape[1], device=tokens.device)


def _prepare(
    backend: str,
    layout: Layout,
    tokens: Tensor,
    cache: CacheSlice | None,
    compiled: bool,
    dtype: torch.dtype,
) -> Attention:
    """Build the mask of one forward pass.

    Args:
        backend: its name.
        layout: which positions see which.
        tokens: [B, T] inputs, both streams side by side.
        cache: keys and values of earlier tokens.
        compiled: whether the blocks are compiled, which needs plain torch operations.
        dtype: of queries, keys and values.

    Raises:
        ValueError: the backend cannot run the layout.
    """
    if cache is not None:  # few queries with a mask of their own
        return Attention("eager" if backend == "eager" else "sdpa", cache.mask, cache=cache)
    (batch, total), device = tokens.shape, tokens.device
    backend = _applied(backend, layout, device, dtype)
    if backend == "flash_attention_2":
        return Attention(backend, segments(layout, total), causal=layout.kind == "causal")
    if backend == "flex_attention":
        return _for_flex(layout, total, device, batch, _clean_stream(layout, total, device, dtype))
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


def _clean_stream(
    layout: Layout, total: int, device: torch.device, dtype: torch.dtype
) -> Attention | None:
    """Return FlashAttention of the second of two streams, where it is causal; None: it cannot run.

    Otherwise its tokens see their block and earlier ones, which segments cannot express.
    """
    if layout.streams == 1 or not layout.causal_context or unsupported(device) is not None:
        return None
    alone = Layout("causal").within(layout.document_ids, layout.documents)
    if runs(alone, dtype):
        return Attention("flash_attention_2", segments(alone, total // 2), causal=True)
    return Attention("sdpa", causal=True) if alone.document_ids is None else None


def _for_flex(
    layout: Layout, total: int, device: torch.device, batch: int, clean: Attention | None
) -> Attention:
    if layout.document_ids is None and layout.finished is None:
        shared = layout.kind, layout.block_size, layout.causal_context
        return replace(_common_flex(*shared, total, device), clean=clean)
    return replace(_flex_masks(layout, total, device, batch, clean is None), clean=clean)


@lru_cache(maxsize=16)
def _common_flex(
    kind: str, block_size: int | None, causal_context: bool, total: int, device: torch.device
) -> Attention:
    """Return the block masks of a layout that all rows share, the same ones for every call."""
    layout = Layout(kind, block_size, causal_context=causal_context)
    return _flex_masks(layout, total, device, None, True)


def _flex_masks(
    layout: Layout, total: int, device: torch.device, rows: int | None, both: bool
) -> Attention:
    """Return the block masks of both streams together, where they are wanted, and of the first."""
    from torch.nn.attention.flex_attention import create_block_mask

    masks, rule, sizes = [], layout.mask_mod(total), (total, total // layout.streams)
    for queries in sizes[: layout.streams]:
        wanted = both or queries < total
        made = (
            create_block_mask(rule, rows, None, queries, total, device=device) if wanted else None
        )
        masks.append(made)
    return Attention("flex_attention", masks[0], noisy=masks[-1])


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
    kernel = _flex_attention(q.device.type)
    if q.shape[2] < k.shape[2]:
        return kernel(q, k, v, block_mask=attention.noisy)
    if (clean := attention.clean) is None:
        return kernel(q, k, v, block_mask=attention.mask)
    noisy, *second = (x.tensor_split(2, dim=2)[i] for x, i in ((q, 0), (q, 1), (k, 1), (v, 1)))
    first = kernel(noisy, k, v, block_mask=attention.noisy)
    return torch.cat([first, BACKENDS[clean.backend](clean, *second)], dim=2)


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
