"""Stages of figures: what the device reaches, and what training and generation make of it."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from gpu_checks.checks import Check, Checks, contained, figure
from gpu_checks.device import clear, finish, milliseconds, timed
from gpu_checks.tokens import TEXT
from gpu_checks.training_step import PHASES, Step
from textdiff import TextDiffusion
from textdiff.planning.memory import peak_memory
from textdiff.train.device_peaks import device_peak


def ceilings(device: torch.device, folder: Path) -> Checks:
    """Measure the bandwidth of a copy and the speed of products."""
    size = 2**28 if device.type == "cuda" else 2**22
    source = torch.empty(size, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device)
    yield figure("copy", 2 * source.nbytes / seconds / 1e9, "GB/s")
    yield figure(f"products in {product_dtype(device)}", product_speed(device) / 1e12, "TFLOP/s")


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of a training step's products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def product_speed(device: torch.device) -> float:
    """Return the operations per second of the product of two large matrices."""
    width = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, width, width, device=device).to(product_dtype(device))
    return 2 * width**3 / timed(lambda: a @ b, device)


def training(device: torch.device, folder: Path) -> Checks:
    """Measure a training step in blocks and not: time, use of the device, memory."""
    reached = product_speed(device)
    for block, attention in ((None, "sdpa"), (16, "sdpa"), (16, "flex_attention")):
        if attention == "sdpa" or device.type == "cuda":
            title = f"blocks of {block}, {attention}"
            yield from contained(title, step_figures(device, block, attention, reached, title))


def step_figures(
    device: torch.device, block: int | None, attention: str, reached: float, title: str
) -> Checks:
    """Measure one kind of step; products reach some operations per second."""
    clear(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = Step(device, block, attention)
    counted = sum(p.numel() for p in step.model.parameters())
    yield Check(f"{title}: parameters less those planned", counted - step.run.counts.total, 0.0)
    seconds = timed(step, device)
    moments = step()
    finish(device)
    yield figure(f"{title}: a step", 1e3 * seconds, "ms")
    for phase, ends in zip(PHASES, pairwise(moments), strict=True):
        yield figure(f"{title}: {phase}", milliseconds(*ends), "ms")
    yield figure(f"{title}: speed", step.tokens / seconds, "tokens/s")
    used = step.tokens * step.run.flops.model / seconds
    yield figure(f"{title}: operations over those of products", used / reached, "")
    if (peak := device_peak(device, bf16=True)) is not None:
        yield figure(f"{title}: MFU", used / peak, f"of {peak / 1e12:.4g} TFLOP/s")
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
        yield figure(f"{title}: memory", memory / 1e9, "GB")
        yield figure(f"{title}: memory over plan", memory / peak_memory(step.run)["peak"], "")


def sampling(device: torch.device, folder: Path) -> Checks:
    """Measure tokens per second of the model that comes with the package."""
    model = TextDiffusion.from_pretrained("demo", device=str(device))
    on_gpu = device.type == "cuda"
    repeats, count = (3, 128) if on_gpu else (1, 32)
    for rows in (1, 16, 64) if on_gpu else (1, 4):
        request = {"num_samples": rows, "max_new_tokens": count, "steps": 32, "seed": 0}
        seconds = timed(lambda request=request: model.generate("", **request), device, repeats)
        yield figure(f"{rows} rows", rows * count / seconds, "tokens/s")
    texts = [f"{TEXT} {index}" for index in range(256 if on_gpu else 4)]
    scored = sum(bound.tokens for bound in model.score(texts))
    yield figure("bound", scored / timed(lambda: model.score(texts), device, repeats), "tokens/s")


def kernels(device: torch.device, folder: Path) -> Checks:
    """Measure the fifteen kernels of a step that take the most time."""
    on_gpu = device.type == "cuda"
    call = Step(device, 16, "flex_attention" if on_gpu else "sdpa")
    call()
    finish(device)
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, *([activity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        finish(device)
    slowest = slowest_kernels(profile.key_averages(), on_gpu)
    if not slowest:  # as in a container that may not read the GPU's counters
        yield Check("kernels", None, 0.0, "the profiler has recorded none", True)
    for name, spent, calls in slowest:
        yield figure(name, spent, f"ms in {calls} calls")


def slowest_kernels(events: Iterable[Any], on_gpu: bool) -> list[tuple[str, float, int]]:
    """Return names, milliseconds and calls of the fifteen events that take the most time.

    On a GPU the profiler also adds a kernel's time to the operation and to the annotation around
    it: only the kernel counts.

    Args:
        events: averages of the profiler.
        on_gpu: kernels of a GPU, else operations of a CPU.
    """
    kind, key = DeviceType.CPU, "self_cpu_time_total"
    if on_gpu:
        kind, key = DeviceType.CUDA, "self_device_time_total"
    own = [e for e in events if e.device_type == kind and not (on_gpu and e.is_user_annotation)]
    own.sort(key=lambda event: -getattr(event, key))
    return [(event.key[:60], getattr(event, key) / 1e3, event.count) for event in own[:15]]
