"""The attention backend of a run: what `auto` means on its device, and why others are refused."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from textdiff.config import Config
from textdiff.config.networks import TextDiffNetwork, TransformersNetwork
from textdiff.errors import ConfigError
from textdiff.models import flash
from textdiff.models.attention import unavailable
from textdiff.pretrained import pretrained_configuration
from textdiff.train.optim import resolve_precision

SMALLEST_FLEX_HEAD = 16
"""Channels of a head that FlexAttention's kernels for GPUs compute at least."""


class Choice(NamedTuple):
    """An attention backend, by its transformers name, with the reason for it."""

    backend: str
    reason: str


def attention_backend(config: Config, device: torch.device) -> Choice:
    """Return the attention backend of a run.

    Raises:
        ConfigError: the config names one that cannot train on the device.
    """
    named = config.model.attn_implementation
    if named == "auto":
        return _fastest(config, device)
    reason = unavailable(named, device, gradients=True)
    flash_runs = reason is None and named == "flash_attention_2"
    if flash_runs and resolve_precision(config.train.mixed_precision, device) != "bf16":
        reason = "flash_attention_2 needs half precision, which this GPU lacks; use sdpa"
    if reason is None and (heads := _needed_heads(named, config)):
        reason = f"{named} needs heads of {heads}; use sdpa"
    if reason is not None:
        raise ConfigError(f"model.attn_implementation: {reason}", code="attention_backend")
    return Choice(named, "as the config says")


def _fastest(config: Config, device: torch.device) -> Choice:
    """Return the backend that `auto` means; SDPA runs everywhere."""
    if device.type != "cuda":
        return Choice("sdpa", f"which serves every layout on {device.type}")
    if config.trains_in_blocks:
        reason = unavailable("flex_attention", device, gradients=True)
        if reason is not None:
            return Choice("sdpa", reason.removesuffix("; use sdpa"))
        if heads := _needed_heads("flex_attention", config):
            return Choice("sdpa", f"as flex_attention needs heads of {heads}")
        return Choice("flex_attention", "which skips what blocks do not see")
    if resolve_precision(config.train.mixed_precision, device) != "bf16":
        return Choice("sdpa", "as flash_attention_2 computes in half precision alone")
    reason = unavailable("flash_attention_2", device, gradients=True)
    if reason is not None:
        return Choice("sdpa", reason.removesuffix("; use sdpa"))
    if heads := _needed_heads("flash_attention_2", config):
        return Choice("sdpa", f"as flash_attention_2 needs heads of {heads}")
    rows = "documents" if config.data.document_mask else "whole sequences"
    return Choice("flash_attention_2", f"which needs no mask for {rows}")


def _needed_heads(backend: str, config: Config) -> str | None:
    """Return which heads a backend's kernels for GPUs compute; None: also those of the network."""
    if backend == "flash_attention_2" and not flash.fits_head(size := _head_size(config)):
        return f"at most {flash.LARGEST_HEAD} channels, a multiple of 8, not {size}"
    if backend == "flex_attention" and (size := _head_size(config)) < SMALLEST_FLEX_HEAD:
        return f"at least {SMALLEST_FLEX_HEAD} channels, not {size}"
    return None


def _head_size(config: Config) -> int:
    """Return the channels of an attention head."""
    section = config.model
    if isinstance(section, TextDiffNetwork):
        return section.hidden_size // section.num_heads
    assert isinstance(section, TransformersNetwork)
    stock = pretrained_configuration(section.path)
    size = getattr(stock, "head_dim", None)
    return int(size or stock.hidden_size // stock.num_attention_heads)


def attention_notes(config: Config, device: torch.device) -> Iterator[str]:
    """Yield a sentence about the backend where a config leaves it open, or its kernels."""
    if config.model.attn_implementation not in ("auto", "flash_attention_2"):
        return
    backend, reason = attention_backend(config, device)
    by = f", by {flash.kernels()}" if backend == "flash_attention_2" else ""
    yield f"attention by {backend}, {reason}{by}"
