"""Options of `textdiff evaluate --tasks`, and its call."""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import Loading, writable
from textdiff.commands.parallel import find_processes
from textdiff.errors import ConfigError
from textdiff.view.progress import quiet_libraries

if TYPE_CHECKING:
    from textdiff.evaluate.exam.running import Exam

DATA_FOLDER = "TEXTDIFF_DATA"


@dataclass(frozen=True)
class ExamOptions:
    """Tasks of lm-evaluation-harness."""

    tasks: str | None = None
    """Names, separated by commas: local ones (blimp, lambada, gsm8k, countdown, sudoku, qa) or the
    harness's, groups, patterns such as `blimp_*` and YAML files; docs/lm-eval.md explains them."""

    limit: float | None = None
    """Questions per task, or a share of them below 1."""

    fewshot: int | None = None
    """Examples before each question; the default is the task's."""

    mc: int = 128
    """Network rows per answer; answers that take fewer to enumerate are exact."""

    precision: float | None = None
    """Standard error of every log-likelihood in nats, such as 0.5, which then decides how many
    rows."""

    use_cache: Path | None = None
    """Keep answers in this file, and take from it those of an earlier start."""

    apply_chat_template: bool = False
    """Write questions as a conversation, by the tokenizer's chat template."""

    qa: Path | None = None
    """JSON lines with `question` and `answer`, for the task qa."""

    @property
    def names(self) -> list[str]:
        """The names of tasks."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    def check(self) -> None:
        """Refuse values out of range before anything is loaded.

        Raises:
            ConfigError: with the flag.
        """
        if not self.names:
            raise ConfigError("--tasks: name at least one task", code="no_tasks")
        if self.limit is not None and not (
            0.0 < self.limit < 1.0 or self.limit % 1.0 == 0.0 < self.limit
        ):
            raise ConfigError(
                f"--limit {self.limit:g}: give a number of questions, or a share below 1",
                code="limit_out_of_range",
            )
        if self.fewshot is not None and self.fewshot < 0:
            raise ConfigError(f"--fewshot {self.fewshot}: give at least 0", code="negative_fewshot")
        writable("--use-cache", self.use_cache)

    def exam(
        self, options: dict[str, Any], seed: int, batch_size: int, batch_tokens: int
    ) -> "Exam":
        """Return the exam; texts take options of the command line before those of a task.

        Raises:
            ConfigError: a value out of range.
        """
        # Before the harness imports its bars: only one process shows them, and only on a terminal.
        if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
            os.environ.setdefault("TQDM_DISABLE", "1")
        # The harness forks for its bootstrap, whose draws here are those of a single fork.
        os.environ.setdefault("DISABLE_MULTIPROC", "1")
        from textdiff.evaluate.exam.answer_bounds import Effort
        from textdiff.evaluate.exam.running import Exam, require_lm_eval

        require_lm_eval()
        folder = os.environ.get(DATA_FOLDER)
        return Exam(
            self.names,
            Effort(self.mc, self.precision, seed, batch_tokens),
            {name: value for name, value in options.items() if value is not None},
            self.limit if self.limit is None or self.limit < 1.0 else int(self.limit),
            self.fewshot,
            batch_size,
            self.apply_chat_template,
            self.use_cache,
            folder or None,
            None if self.qa is None else str(self.qa),
        )


def sit_exam(model: str, loading: Loading, exam: "Exam") -> tuple[dict[str, Any], list[str]] | None:
    """Return the record and the lines of an exam; None on all processes but the first."""
    quiet_libraries()
    processes = find_processes()
    held = loading.load(model, processes.device)
    with redirect_stdout(sys.stderr):  # the harness prints beside its result
        result = exam.run(held)
    if result is None or not processes.first:
        return None
    record: dict[str, Any] = {
        "model": model,
        "command": ["textdiff", *sys.argv[1:]],
        "tasks": list(exam.tasks),
    }
    record |= {"sampling": dict(exam.options), "limit": exam.limit, "fewshot": exam.fewshot}
    return record | result.record(), result.lines()
