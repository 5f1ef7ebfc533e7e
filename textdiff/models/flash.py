"""FlashAttention (arXiv:2307.08691): kernels of the package `flash_attn`, or those of torch.

They compute in half precision on GPUs and hold no scores. Whole sequences are rows of one length;
there torch's SDPA runs the same kernels, so that the package is not needed. Documents are segments
of one long row, which needs no mask: `flash_attn_varlen_func`, or torch's `varlen_attn`.

Shapes: B rows, T positions, D channels of a head, S segments.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from .layout import Layout

HALF = (torch.bfloat16, torch.float16)
"""Dtypes that the kernels compute in."""

OLDEST = (8, 0)
"""Compute capability of the first GPUs that they run on."""

LARGEST_HEAD = 256
"""Channels of a head, a multiple of eight, that they compute at most."""


@dataclass(frozen=True)
class PackedDocuments:
    """Documents of a batch, one after the other.

    A run of padding is a segment, too: no document sees it, and what it computes is not read.

    Attributes:
        offsets: [S + 1] int32, where segments begin among all B * T positions, then that number.
        longest: positions of the longest one, at most.
        package: whether `flash_attn` runs them, or torch.
    """

    offsets: Tensor
    longest: int
    package: bool


@cache
def installed() -> bool:
    """Return whether the package `flash_attn` can be imported."""
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        return False
    return True


def kernels() -> str:
    """Return whose kernels run, in words."""
    if installed():
        return "the kernels of the package flash_attn"
    return "torch's own kernels, as the package flash_attn is not installed"


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def unsupported(device: torch.device) -> str | None:
    """Return why no kernel runs on a device, as a sentence; None: they do."""
    if device.type != "cuda":
        return f"flash_attention_2 needs a CUDA device, not {device.type}; use sdpa"
    if capability(device) < OLDEST:
        return "flash_attention_2 needs a GPU of compute capability 8.0 or newer; use sdpa"
    return None


def fits_head(size: int) -> bool:
    """Return whether the kernels compute heads of so many channels."""
    return size % 8 == 0 and size <= LARGEST_HEAD


def runs(layout: Layout, dtype: torch.dtype) -> bool:
    """Return whether these kernels run a call; SDPA runs the others.

    Without gradients SDPA runs layouts of blocks too, as in generation and for bounds.

    Raises:
        ValueError: training in a layout that they have no masks for.
    """
    if layout.kind not in ("full", "causal"):
        if torch.is_grad_enabled():
            raise ValueError(
                f"flash_attention_2 cannot run the {layout.kind} layout; use sdpa or flex_attention"
            )
        return False
    if dtype not in HALF:
        return False
    return installed() if layout.document_ids is None else layout.documents is not None


def segments(layout: Layout, total: int) -> PackedDocuments | None:
    """Return the documents of a layout as segments; None: every row is one document.

    They were counted on the CPU, which therefore does not wait. There may be fewer: segments of
    zero length follow, which both kernels skip, as their documentation says.
    """
    ids = layout.document_ids
    if ids is None:
        return None
    first = ids != functional.pad(ids[:, :-1], (1, 0))  # [B, T]
    first[:, 0] = True
    at = torch.arange(first.numel(), device=ids.device)  # [B T]
    beyond = torch.full_like(at, first.numel())
    begins = torch.where(first.flatten(), at, beyond).sort().values  # [B T]
    count = min(_rounded(layout.documents), len(begins))
    offsets = torch.cat([begins[:count], beyond[:1]]).int()  # [S + 1]
    return PackedDocuments(offsets, total, installed())


def _rounded(count: int) -> int:
    """Return the next power of two: compiled blocks see few shapes."""
    return 1 << (count - 1).bit_length()


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, cut: PackedDocuments | None
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v, [B, H, T, D], within segments.

    Args:
        q: [B, H, T, D] queries.
        k: keys, of as many heads or of some that several queries share.
        v: values, likewise.
        causal: whether no position sees a later one.
        cut: the segments; None: rows are.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, T, heads, D]
    if cut is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, causal=causal).transpose(1, 2)
    attend = _by_package if cut.package else _by_torch
    out = attend(*(x.flatten(0, 1) for x in (q, k, v)), cut, causal)  # [B T, H, D]
    return out.view(q.shape).transpose(1, 2)


def _by_package(q: Tensor, k: Tensor, v: Tensor, cut: PackedDocuments, causal: bool) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    places = cut.offsets, cut.offsets, cut.longest, cut.longest
    return flash_attn_varlen_func(q, k, v, *places, causal=causal)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, cut: PackedDocuments, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    places = cut.offsets, cut.offsets, cut.longest, cut.longest
    window = (-1, 0) if causal else (-1, -1)  # positions to the left and to the right; -1: all
    shared = k.shape[1] != q.shape[1]
    return varlen_attn(q, k, v, *places, window_size=window, enable_gqa=shared)
