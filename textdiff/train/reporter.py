"""What a training run tells the outside; the trainer itself prints nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textdiff.likelihood import Bound
from textdiff.likelihood.bound import finite
from textdiff.train.ranges import RangeChoice


@dataclass(frozen=True)
class StepReport:
    """One logged step.

    Attributes:
        step: optimizer steps done.
        steps: optimizer steps in all.
        loss: training loss since the last report, nats per token: with the weights, over the mask
            rates and in the block sizes of training, so in general no bound.
        learning_rate: of AdamW.
        grad_norm: gradient norm of the last step before clipping.
        tokens: training tokens seen.
        tokens_per_second: since the last report.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float


class Reporter:
    """Receives what happens; every method may be overridden, none needs to be."""

    def message(self, text: str) -> None:
        """A sentence about the run."""

    def started(self, facts: dict[str, Any]) -> None:
        """The run is set up: directory, parameters, precision, where it resumes."""

    def stepped(self, step: int) -> None:
        """An optimizer step was issued."""

    def logged(self, report: StepReport) -> None:
        """A step was logged."""

    def evaluating(self, done: int, total: int) -> None:
        """The validation bound has scored this many windows."""

    def evaluated(self, step: int, bound: Bound) -> None:
        """A validation bound is there."""

    def also_evaluated(self, step: int, block_size: int | None, bound: Bound) -> None:
        """The bound in another of the block sizes that are trained is there, before `evaluated`."""

    def range_found(self, step: int, block_size: int | None, choice: RangeChoice) -> None:
        """Mask rates for training in a block size were chosen, before `evaluated`."""

    def sampled(self, step: int, texts: list[str]) -> None:
        """Samples were drawn."""

    def finished(self) -> None:
        """Training is over."""


def evaluation_values(
    bounds: Mapping[int | None, Bound], choices: Mapping[int | None, RangeChoice]
) -> dict[str, Any]:
    """An evaluation's line: plain names for the first block size, `bound_nats_4` for another.

    Args:
        bounds: of every block size that is trained, the default one first.
        choices: mask rates that were searched, if any.
    """
    default = next(iter(bounds))
    values: dict[str, Any] = {}
    for size, bound in bounds.items():
        found = {
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
            found |= {
                "noise_low": choice.range[0],
                "noise_high": choice.range[1],
                "loss_variance": choice.variance,
                "loss_variance_unclipped": choice.unclipped,
            }
        ending = "" if size == default else f"_{size or 'full'}"
        values |= {name + ending: value for name, value in found.items()}
    return values


class MetricsFile:
    """Appends to a run's metrics; lines after the step that a run resumes from are cut first.

    Args:
        path: the file.
        step: the step the run continues from (0: a fresh file).
        bound_step: the step of the newest validation bound that it continues with; one that was
            written after the checkpoint will be computed and written again.
    """

    def __init__(self, path: Path, step: int, bound_step: int):
        self.path = path
        kept = []
        for line in self._lines() if step > 0 else []:
            values = json.loads(line)
            if values["step"] <= (bound_step if "bound_nats" in values else step):
                kept.append(line)
        # Renamed into place: a kill between emptying and filling would lose what is kept.
        scratch = path.with_name(f".{path.name}")
        scratch.write_text("".join(kept), encoding="utf-8")
        scratch.replace(path)

    def write(self, values: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [
            line for line in lines if line.endswith("}\n")
        ]  # a killed run may leave half a line
