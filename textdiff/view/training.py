"""The progress of a training run: a live bar in a terminal, plain lines elsewhere."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from textdiff.likelihood.bound import Bound
from textdiff.train.reporter import Bounds, Choices, Reporter
from textdiff.view.progress import Bars, unfailing


def describe_bound(bound: Bound) -> str:
    """Return a bound in one line: perplexity, bits/byte and nats/token, with standard errors."""
    sign = "≤" if bound.is_bound else "≈"
    per_byte = ""
    if bound.bits_per_byte is not None:
        bits = bound.stderr * bound.tokens / bound.bytes / math.log(2.0)
        spread = "" if bound.doubt else f" ± {bits:.4f}"
        per_byte = f"{bound.bits_per_byte:.4f}{spread} bits/byte, "
    if bound.doubt:
        return (
            f"perplexity {sign} {format_perplexity(bound.perplexity)}, {per_byte}"
            f"{bound.mean:.4f} nats/token, of unknown error"
        )
    error = bound.perplexity * bound.stderr if bound.stderr else 0.0  # infinity times 0 is none
    return (
        f"perplexity {sign} {format_perplexity(bound.perplexity)} ± {format_perplexity(error)}, "
        f"{per_byte}{bound.mean:.4f} ± {bound.stderr:.4f} nats/token"
    )


def format_perplexity(value: float) -> str:
    """Return a perplexity for people: three decimals, or three digits where it is huge."""
    return f"{value:.3f}" if value < 1e7 else f"{value:.3g}"


def describe_use(values: Mapping[str, float]) -> str:
    """Return the use of the device and its peak of memory, where they are known."""
    use = f"  {values['mfu']:.1%} MFU" if "mfu" in values else ""
    return use + (f"  {values['memory'] / 1e9:.1f} GB" if "memory" in values else "")


def in_blocks(block_size: int | None) -> str:
    """Return a block size in words."""
    return "over the whole sequence" if block_size is None else f"in blocks of {block_size}"


class PlainView(Reporter):
    """View of a run with one line per event, for pipes, files and logs."""

    def __init__(self, console: Console):
        self.console = console
        self.bits_per_byte: float | None = None
        self.steps = 0

    def message(self, text: str) -> None:
        wide = not self.console.is_terminal  # a terminal wraps at words, a file keeps its lines
        self.console.print(text, highlight=False, markup=False, soft_wrap=wide)

    def started(self, facts: dict[str, Any]) -> None:
        corpus, self.steps = facts["corpus"]["train"], facts["steps"]
        where = f"resumed from {facts['resumed']}" if facts["resumed"] else "a fresh start"
        self.message(f"run {facts['directory']}: {where}, step {facts['step']} of {facts['steps']}")
        self.message(
            f"{facts['parameters']:,} parameters, {facts['vocabulary']:,} vocabulary ids, "
            f"{corpus['tokens']:,} training tokens; {facts['device']}, {facts['precision']}, "
            f"{facts['processes']} process(es)"
        )

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        bound = "" if self.bits_per_byte is None else f"  bits/byte ≤ {self.bits_per_byte:.3f}"
        self.message(
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {values['loss']:.4f}"
            f"{bound}  {values['tokens_per_second']:,.0f} tokens/s{describe_use(values)}"
        )

    def evaluated(self, step: int, bounds: Bounds, choices: Choices) -> None:
        for size, choice in choices.items():
            low, high = choice.range
            self.message(
                f"step {step} mask rates {in_blocks(size)}: {low:g} to {high:g}, where the loss "
                f"has variance {choice.variance:.3g} instead of {choice.unclipped:.3g}"
            )
        (_, bound), *others = bounds.items()
        for size, other in others:
            self.message(f"step {step} validation {in_blocks(size)}: {describe_bound(other)}")
        self.bits_per_byte = bound.bits_per_byte
        self.message(f"step {step} validation: {describe_bound(bound)}")

    def sampled(self, step: int, texts: list[str]) -> None:
        for text in texts[:1]:
            self.message(f"step {step} sample: {' '.join(text.split())[:300]}")


class LiveView(PlainView):
    """View of a run with a bar of loss, bound, speed and time left."""

    def __init__(self, console: Console):
        super().__init__(console)
        self.values: Mapping[str, float] = {}
        bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
        )
        self.progress = unfailing(bars)
        self.training = self.progress.add_task("training", total=None, figures="")
        self.evaluation = self.progress.add_task(
            "validation", total=None, figures="", visible=False
        )

    def started(self, facts: dict[str, Any]) -> None:
        super().started(facts)
        self.progress.update(self.training, total=facts["steps"], completed=facts["step"])
        self.progress.start()

    def stepped(self, step: int) -> None:
        self.progress.update(self.training, completed=step)

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        self.values = values
        self._figures()

    def evaluating(self, done: int, total: int) -> None:
        self.progress.update(self.evaluation, completed=done, total=total, visible=True)

    def evaluated(self, step: int, bounds: Bounds, choices: Choices) -> None:
        self.progress.update(self.evaluation, visible=False)
        super().evaluated(step, bounds, choices)
        self._figures()

    def finished(self) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()

    def _figures(self) -> None:
        parts = []
        if self.values:
            parts.append(f"loss {self.values['loss']:.3f}")
        if self.bits_per_byte is not None:
            parts.append(f"bits/byte ≤ {self.bits_per_byte:.3f}")
        if self.values:
            speed = self.values["tokens_per_second"]
            parts.append(f"{speed:,.0f} tok/s{describe_use(self.values)}")
        self.progress.update(self.training, figures="  ".join(parts))
