"""Texts on the screen and in files while they are generated."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from textdiff.pipeline import TextDiffusion
from textdiff.sampling.callbacks import Callback, FinishedRow
from textdiff.sampling.job import Job
from textdiff.sampling.step import Step
from textdiff.view.cells import Pieces, Reader
from textdiff.view.live import LiveRows
from textdiff.view.progress import unfailing
from textdiff.view.recorders import Film, Trace
from textdiff.view.streams import check_written, has_reader

SEPARATOR = "\n\n---\n\n"


class TextPrinter(Callback):
    """Printer of finished texts, in their order.

    Args:
        model: decodes what is not finished.
        held: print nothing before `release`: the screen is another's until then.
        alone: nothing but what is printed is left, so without a reader there is nothing to do.
        answers: print what follows the prompts alone.
    """

    def __init__(
        self, model: TextDiffusion, held: bool, alone: bool = False, answers: bool = False
    ):
        self.model, self.held, self.alone, self.answers = model, held, alone, answers
        self.done: dict[int, FinishedRow] = {}
        self.rows = self.next = self.said = 0
        self.last: Step | None = None

    def begin(self, job: Job) -> None:
        """Know what to expect."""
        self.job, self.last = job, None
        self.rows += len(job.prompts)

    def step(self, step: Step) -> None:
        """Remember how far texts are."""
        self.last = step

    def finished(self, row: int, result: FinishedRow) -> None:
        """Print a text whose turn it is."""
        self.done[result.index] = result
        while not self.held and self.next in self.done:
            self._say(self.done[self.next])
            self.next += 1

    def release(self) -> None:
        """Print what waits."""
        for index in sorted(self.done):
            if index >= self.next:
                self._say(self.done[index])
        print()

    def interrupted(self) -> None:
        """Print what waits, and what will not change of texts that are not finished."""
        if self.last is not None:
            assert self.last.final is not None
            for row, (_, index) in enumerate(self.job.row_keys):
                final, start = int(self.last.final[row]), int(self.job.onwards[row, 0])
                if index not in self.done and final > start:
                    ids = self.last.canvas[row, :final].tolist()
                    text, new = self.model.decode(ids), self.model.decode(ids[start:])
                    self.done[index] = FinishedRow(0, index, text, new, [], ids, final - start)
        self.release()

    def _say(self, row: FinishedRow) -> None:
        text = row.completion.strip() if self.answers else row.text
        print((SEPARATOR if self.said else "") + text, end="", flush=True)
        self.said += 1
        if self.alone and not has_reader(sys.stdout):
            check_written(sys.stdout)
            raise SystemExit(1)


@contextmanager
def recording(
    model: TextDiffusion,
    name: str,
    task: Mapping[str, Any],
    film: Path | None = None,
    trace: Path | None = None,
) -> Iterator[list[Callback]]:
    """Yield callbacks that write a film and a trace, also of a generation that is interrupted.

    Args:
        model: the model that generates.
        name: what the user calls it.
        task: arguments of `TextDiffusion.generate`.
        film: the HTML file to write, if any.
        trace: the .jsonl file to write, if any.
    """
    recorders: list[Film | Trace] = []
    with ExitStack() as stack:
        if film is not None:
            facts = _facts(model, name, task)
            recorders.append(Film(film, reader_of(model), _title(task), facts))
            stack.callback(recorders[-1].close)
        if trace is not None:
            file = stack.enter_context(trace.open("w", encoding="utf-8"))
            reader = reader_of(model)
            recorders.append(Trace(file, reader.pieces, reader.mask))
            stack.callback(recorders[-1].close)
        yield [*recorders]


def _title(task: Mapping[str, Any]) -> str:
    prompts = task["prompts"]
    words = " ".join((prompts if isinstance(prompts, str) else str(prompts[0])).split())
    return words if 0 < len(words) <= 80 else f"{words[:79]}…" if words else "From nothing"


def _facts(model: TextDiffusion, name: str, task: Mapping[str, Any]) -> dict[str, str]:
    """Return what the film says about its making: the model and the options."""
    asked = {key: value for key, value in task.items() if value not in (None, (), [], "")}
    settings = {"rule": model.defaults.rule, "steps": model.defaults.steps, **asked}
    hidden = ["prompts", "batch_size"]
    if task.get("cache") != "approximate":  # an exact one has no part in the text
        hidden.append("cache")
    facts = {key.replace("_", " "): written(value) for key, value in settings.items()}
    return {"model": name} | {k: v for k, v in facts.items() if k.replace(" ", "_") not in hidden}


def written(value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    return shlex.join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@contextmanager
def live(
    console: Console, model: TextDiffusion, task: Mapping[str, Any], answers: bool = False
) -> Iterator[Callback]:
    """Show rows in a terminal while they are denoised; nothing is left of it in the end.

    Args:
        console: the terminal.
        model: the model that generates.
        task: arguments of `TextDiffusion.generate`.
        answers: show what follows the prompts alone.
    """
    steps = task.get("steps") or model.defaults.steps
    tokens = task.get("max_new_tokens") or model.defaults.max_new_tokens
    blocks = -(-tokens // (model.family.block_size or tokens))
    calls = min(tokens, steps * blocks)
    prompts = task.get("prompts", "")
    count = task.get("num_samples", 1) * (1 if isinstance(prompts, str) else len(prompts))
    rows = LiveRows(console, reader_of(model), count, calls, answers)
    with unfailing(rows) as view:
        yield view


def can_animate(console: Console) -> bool:
    """Return whether a terminal can move its cursor and show all characters."""
    able = console.is_terminal and not console.is_dumb_terminal
    return able and not console.options.ascii_only


def reader_of(model: TextDiffusion) -> Reader:
    """Return the maker of cells for a model's tokens."""
    mask = model.family.process.vocabulary.mask_token_id
    return Reader(Pieces(model.tokenizer, [mask]), mask, model.tokenizer.eos_token_id)


def watch_rows(console: Console, model: TextDiffusion, num_samples: int, seed: int) -> None:
    """Show samples from nothing while they are denoised, then prints them."""
    texts = TextPrinter(model, held=True)
    task = {"num_samples": num_samples, "seed": seed}
    with live(console, model, task) as view:
        model.generate("", callbacks=[view, texts], num_samples=num_samples, seed=seed)
    texts.release()
