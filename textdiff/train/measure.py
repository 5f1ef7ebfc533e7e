"""Speed, use of the device, memory and waits for data between two log lines.

Nothing here asks the device for a value: clocks are the CPU's, which waits for the device when a
line is logged, and peaks of memory are those of the allocator's own books.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator

from textdiff.config import Config
from textdiff.models import Denoiser
from textdiff.train.device_peaks import device_peak
from textdiff.train.operations import flops_per_token

T = TypeVar("T")

TIMED = ("tokens_per_second", "mfu", "memory", "data_wait")
"""Metrics that differ from one run of the same numbers to another."""


class Meter:
    """Measurements since the last log line.

    Args:
        device: of this process.
        flops_per_token: operations of the model per token.
        peak: operations per second of all devices together; None: unknown.
    """

    def __init__(self, device: torch.device, flops_per_token: float, peak: float | None):
        self.device, self.flops_per_token, self.peak = device, flops_per_token, peak
        self._waited = 0.0
        self.restart(0)

    @classmethod
    def of(cls, config: Config, model: Denoiser, accelerator: Accelerator) -> "Meter":
        """Return the meter of a run, whose devices are alike."""
        device = accelerator.device
        peak = device_peak(device, accelerator.mixed_precision == "bf16")
        together = None if peak is None else peak * accelerator.num_processes
        return cls(device, flops_per_token(config, model).model, together)

    def restart(self, tokens: int) -> None:
        """Begin to measure.

        Args:
            tokens: seen by the run so far.
        """
        self._tokens, self._waited = tokens, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens while entered out of the time, such as bounds and checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def fetched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, and measure how long this process waits for each."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def values(self, tokens: int) -> dict[str, float]:
        """Return what was measured, by its name in the metrics.

        Args:
            tokens: seen by the run so far.
        """
        seconds = time.perf_counter() - self._start
        speed = (tokens - self._tokens) / seconds
        measured = {"tokens_per_second": speed, "data_wait": self._waited / seconds}
        if self.peak is not None:
            measured["mfu"] = speed * self.flops_per_token / self.peak
        if self.device.type == "cuda":
            measured["memory"] = torch.cuda.max_memory_allocated(self.device)
        return measured
