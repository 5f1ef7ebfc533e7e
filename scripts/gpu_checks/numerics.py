"""Stages that compare kernels and training steps with references of float64."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gpu_checks.cases import OBJECTIVES, SMALL, Case
from gpu_checks.checks import Check, Checks, contained, difference
from textdiff.diffusion.corruption import count_documents
from textdiff.models import Layout, flash
from textdiff.models.attention import attend, prepare
from textdiff.models.chunked_sum import add_product


def steps(device: torch.device, folder: Path) -> Checks:
    """Compare every objective, in blocks and not, with float64 on the CPU."""
    for name in OBJECTIVES:
        for size in (None, 16) if name != "ar" else (None,):
            title = f"{name}, blocks of {size}"
            yield from contained(title, step_checks(device, name, size, title))


def step_checks(device: torch.device, name: str, size: int | None, title: str) -> Checks:
    """Compare loss and gradients of a step."""
    case = Case(name, size, SMALL, 4, 64)
    reference = case.step(torch.device("cpu"), torch.float64)
    values = case.step(device, torch.float32)
    for kind, one, other in zip(("loss", "gradient"), values, reference, strict=True):
        yield Check(f"{title}, {kind}", difference(one, other), 1e-3)


def documents(device: torch.device, folder: Path) -> Checks:
    """Compare FlashAttention within documents, and products of the head added to a sum in place."""
    if device.type != "cuda":
        yield Check("documents", None, 0.0, "tests/devices does it by stand-ins on a CPU", True)
        return
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 40 + [1] + [2] * 87, [-1] * 28 + [3] * 100])  # [2, 128]
    leaves = [torch.randn(2, heads, 128, 64).bfloat16() for heads in (4, 2, 2)]
    for kind in ("full", "causal"):
        for package in sorted({False, flash.installed()}):
            title = f"{kind}, {'flash_attn' if package else 'torch'}"
            yield from contained(title, flash_checks(device, kind, package, ids, leaves, title))
    yield from contained("product added in place", product_checks(device))


def flash_checks(
    device: torch.device,
    kind: str,
    package: bool,
    ids: Tensor,
    leaves: Sequence[Tensor],
    title: str,
) -> Checks:
    """Compare outputs and gradients of one layout with `eager`, where no padding is."""
    layout = Layout(kind).within(ids, count_documents(ids))
    read = (ids >= 0)[:, None, :, None].double()
    wide = [x.double().requires_grad_() for x in leaves]
    expected = attend(prepare("eager", layout, torch.empty(2, 128)), *wide) * read
    expected.sum().backward()
    segments = flash.segments(layout.within(ids.to(device), layout.documents), 128)
    half = [x.to(device, copy=True).requires_grad_() for x in leaves]
    segments = replace(segments, package=package)
    out = flash.flash_attention(*half, kind == "causal", segments) * read.to(device)
    out.sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(half, wide, strict=True))]
    yield Check(title, max(difference(a.double().cpu(), b) for a, b in pairs), 0.02)


def product_checks(device: torch.device) -> Checks:
    """Compare a product of bfloat16 that is added to float32."""
    one, other = (torch.randn(256, n, device=device).bfloat16() for n in (96, 64))
    total = torch.randn(96, 64, device=device)
    expected = total.double() + one.double().t() @ other.double()
    add_product(total, one.t(), other)
    yield Check("product added in place", difference(total, expected), 1e-4)
