"""Reports of a training run: events for views, and the lines of `metrics.jsonl`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textdiff.likelihood.bound import Bound, finite
from textdiff.storage import whole_file
from textdiff.train.ranges import RangeChoice

Bounds = Mapping[int | None, Bound]
Choices = Mapping[int | None, RangeChoice]


class Reporter:
    """Receiver of a run's events, whose methods do nothing unless overridden."""

    def message(self, text: str) -> None:
        """Receive a sentence about the run."""

    def started(self, facts: dict[str, Any]) -> None:
        """Receive the directory, parameters, precision and start of a run that is set up."""

    def stepped(self, step: int) -> None:
        """Receive the number of an optimizer step that was issued."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Receive what is logged of a step.

        Args:
            step: optimizer steps done.
            values: `loss`, `learning_rate`, `grad_norm`, `tokens` and what `Meter` measured. The
                loss is that of training since the last time, nats per token: with the weights, over
                the mask rates and in the block sizes of training, so in general not a bound.
        """

    def evaluating(self, done: int, total: int) -> None:
        """Receive how many windows the validation bound has scored."""

    def evaluated(self, step: int, bounds: Bounds, choices: Choices) -> None:
        """Receive validation bounds by block size, the default first, and searched mask rates."""

    def sampled(self, step: int, texts: list[str]) -> None:
        """Receive samples."""

    def finished(self) -> None:
        """Learn that training is over."""


def evaluation_values(bounds: Bounds, choices: Choices) -> dict[str, Any]:
    """Return the values of an evaluation; block sizes after the first add a suffix to names.

    Args:
        bounds: of every block size that is trained, the default one first.
        choices: mask rates that were searched, if any.
    """
    default = next(iter(bounds))
    values: dict[str, Any] = {}
    for size, bound in bounds.items():
        measured = {
            "bound_nats": bound.mean,
            "bound_stderr": bound.stderr if bound.is_reliable else None,
            "bound_text_stderr": bound.text_stderr,
            "bits_per_byte": bound.bits_per_byte,
            "perplexity_bound": finite(bound.perplexity),
            "bound_tokens": bound.tokens,
            "bound_estimator": bound.estimator,
            "bound_replicates": bound.replicates,
        }
        if size in choices:
            choice = choices[size]
            measured |= {
                "noise_low": choice.range[0],
                "noise_high": choice.range[1],
                "loss_variance": choice.variance,
                "loss_variance_unclipped": choice.unclipped,
            }
        ending = "" if size == default else f"_{size or 'full'}"
        values |= {name + ending: value for name, value in measured.items()}
    return values


class MetricsFile:
    """Metrics of a run, cut back to the step that it resumes from.

    Args:
        path: the file.
        step: the step the run continues from (0: a fresh file).
        bound_step: the step of the newest validation bound that it continues with; one that was
            written after the checkpoint will be computed and written again.
    """

    def __init__(self, path: Path, step: int, bound_step: int):
        self.path = path
        text = path.read_text(encoding="utf-8") if step > 0 and path.exists() else ""
        kept = []
        for line in text.splitlines(keepends=True):
            values = (
                json.loads(line) if line.endswith("}\n") else {}
            )  # a kill may leave half a line
            if values and values["step"] <= (bound_step if "bound_nats" in values else step):
                kept.append(line)
        # Renamed into place: a kill between emptying and filling would lose what is kept.
        with whole_file(path) as scratch:
            scratch.write_text("".join(kept), encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
