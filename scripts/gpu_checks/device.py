"""A device between and during measurements: set up, cleared, waited for, and timed."""

import gc
import math
import os
import time
from collections.abc import Callable

import torch
import torch._dynamo


def set_up(device: torch.device) -> None:
    """Prepare this process for exact products on a device, and for all stages in turn."""
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.config.recompile_limit = 256
    if device.type == "cuda":
        # For `train.deterministic`: torch reads it once, at the first product of the process.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device.index or 0)  # events, and "cuda" alone, mean the current one


def clear(device: torch.device) -> None:
    """Forget compiled variants and free memory, which would count as the next measurement's."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the least seconds of a call, after a first one."""
    call()
    best = math.inf
    for _ in range(repeats):
        finish(device)
        start = time.perf_counter()
        call()
        finish(device)
        best = min(best, time.perf_counter() - start)
    return best


Moment = float | torch.cuda.Event


def moment(device: torch.device) -> Moment:
    """Return this moment, of the CPU's clock or in the device's stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Moment, end: Moment) -> float:
    """Return the time between two moments, of which a device has passed the second."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
