"""Profile of a few training steps: a trace of torch's profiler, and the time of each phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from textdiff.config import Config
from textdiff.storage import whole_file

PHASES = ("data", "forward", "backward", "optimizer", "averages")
WARM_UP = 3  # steps before the profile: blocks are compiled, memory and work spaces allocated
_NOTHING = nullcontext()


class StepProfile(AbstractContextManager["StepProfile"]):
    """Profile of a run's first steps after a warm-up, while entered; it changes no number.

    Phases are timed by the CPU's clock, and on a GPU by events in its stream. Waits for data are
    the CPU's in either case.

    Args:
        steps: how many steps are profiled; None: none, and nothing is done.
        device: of this process.
        folder: the trace is written to.
        report: receives the table of phases in a sentence.
    """

    def __init__(
        self, steps: int | None, device: torch.device, folder: Path, report: Callable[[str], None]
    ):
        self.steps, self.device, self.folder, self.report = steps, device, folder, report
        self._done = self._last = 0
        self._start = self._end = 0.0
        self._spans: list[tuple[str, Any, Any]] = []
        self._profiler: profile | None = None

    @classmethod
    def of(
        cls, config: Config, accelerator: Accelerator, report: Callable[[str], None]
    ) -> "StepProfile":
        """Return the profile of a run, on its main process alone."""
        steps = config.train.profile if accelerator.is_main_process else None
        return cls(steps, accelerator.device, Path(config.run.dir) / "profile", report)

    def __enter__(self) -> "StepProfile":
        """Begin with the warm-up."""
        if self.steps is not None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
            self._profiler = profile(
                activities=activities,
                schedule=plan,
                on_trace_ready=self._write,
                acc_events=True,  # else it warns that there is one cycle
            )
            self._profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and report a run that was too short."""
        if self._profiler is None:
            return
        self._profiler.on_trace_ready = None
        self._profiler.stop()
        self._profiler = None
        self.report(
            f"train.profile: {self.steps} steps are profiled after {WARM_UP} others, and there "
            f"were {self._done} in all; no trace was written"
        )

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a range of the trace, whose time is measured."""
        return _NOTHING if self._profiler is None else self._timed(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        on_device = self.device.type == "cuda" and name != "data"
        with record_function(name):
            start = _mark(on_device)
            yield
            end = _mark(on_device)
        if self._done >= WARM_UP:
            self._spans.append((name, start, end))

    def stepped(self, step: int) -> None:
        """Count a step.

        Args:
            step: of the run.
        """
        if self._profiler is None:
            return
        self._done, self._last = self._done + 1, step
        if self._done == WARM_UP + (self.steps or 0):
            self._wait()
            self._end = time.perf_counter()  # what the profiler does then takes longer than steps
        self._profiler.step()
        if self._done == WARM_UP:
            self._wait()
            self._start = time.perf_counter()
        if self._done == WARM_UP + (self.steps or 0):
            self._profiler.stop()
            self._profiler = None

    def _write(self, profiler: profile) -> None:
        """Write the trace, and report the phases."""
        assert self.steps is not None
        whole = 1e3 * (self._end - self._start) / self.steps
        first = self._last - self.steps + 1
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"steps-{first}-{self._last}.json"
        with whole_file(target) as scratch:
            profiler.export_chrome_trace(str(scratch))
        shares = ", ".join(f"{name} {ms:.1f}" for name, ms in self.phases().items())
        self.report(
            f"steps {first} to {self._last} took {whole:.1f} ms each under the profiler: "
            f"{shares}; trace for ui.perfetto.dev: {target}"
        )

    def phases(self) -> dict[str, float]:
        """Return milliseconds per step by phase."""
        times = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spans:
            ms = 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)
            times[name] += ms / (self.steps or 1)
        return times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _mark(on_device: bool) -> Any:
    """Return this moment, of the CPU or in the device's stream."""
    if not on_device:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
