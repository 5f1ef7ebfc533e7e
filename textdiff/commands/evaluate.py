"""`textdiff evaluate`: quality of the texts of a model, beside real ones."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import (
    Dtype,
    JsonFlag,
    Loading,
    check_standard_input,
    read_documents,
    writable,
)
from textdiff.commands.exam import ExamOptions, sit_exam
from textdiff.commands.sampling import Sampling
from textdiff.errors import ConfigError
from textdiff.view.progress import ProgressBar, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.evaluate.judges import Judge
    from textdiff.evaluate.suites import Suite, SuiteOptions, SuiteResult


@dataclass(frozen=True)
class MeasureOptions:
    """Texts to measure, and the judge that measures them."""

    texts: tuple[str, ...] = ()
    """Measure the texts of these files instead of sampled ones, other systems' samples too; `-`
    reads standard input."""

    reference: tuple[str, ...] = ()
    """Real text: files, folders or patterns, `-` for standard input. It is cut into pieces as long
    as the samples."""

    text_column: str = "text"
    """Column or key that holds the text in files of rows."""

    judge: str | None = None
    """Causal language model that gives texts a likelihood: a folder or hub id in Hugging Face
    layout, or a textdiff export trained with the objective ar."""

    judge_dtype: Dtype = "float32"
    """Dtype of the judge; likelihoods are normalised in float32 or wider in any case."""

    batch_tokens: int = 4096
    """Tokens per network call of the judge (results do not depend on it beyond rounding)."""

    mauve: bool = False
    """Add MAUVE; needs a transformers judge, a reference and the package mauve-text."""

    resamples: int = 1000
    """Random halves of the texts, which intervals come from."""

    num_samples: int = 64
    """Texts to generate."""

    batch_size: int = 16
    """Texts generated together (they do not depend on it)."""

    def check(self) -> None:
        """Refuse values out of range, and what is not installed, before anything is loaded.

        Raises:
            ConfigError: with the flag.
        """
        check_standard_input((*self.texts, *self.reference))
        if self.batch_tokens < 1:
            raise ConfigError(f"--batch-tokens {self.batch_tokens}: give at least 1")
        if self.mauve:
            from textdiff.evaluate.figures import require_mauve

            require_mauve()

    def load_judge(self, device: str | None) -> "Judge | None":
        """Load the judge onto a device, if one was named.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: its likelihood is not exact.
        """
        if self.judge is None:
            return None
        from textdiff.evaluate.judges import load_judge

        return load_judge(self.judge, device, self.judge_dtype, self.batch_tokens)

    def read(self, names: tuple[str, ...]) -> list[str] | None:
        """Return the documents of files; None where none are named."""
        return list(read_documents(names, self.text_column)) if names else None


STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True)
class SweepOptions:
    """Settings that a sweep goes over, and files for results."""

    grid: Path | None = None
    """YAML file with the settings of a frontier; docs/evaluation.md shows one."""

    output: Path | None = None
    """Write the result to this JSON file; a frontier saves every point there, and goes on
    from it when it is started again. `-`: standard output, as --json."""

    picture: Path | None = None
    """Draw a frontier into this PNG file."""

    def check(self, suite: str, sweeps: bool) -> None:
        """Refuse what does not go together, before anything is loaded.

        Raises:
            ConfigError: with the flag.
        """
        writable("--output", None if self.output == STANDARD_OUTPUT else self.output)
        writable("--picture", self.picture)
        if sweeps and self.output == STANDARD_OUTPUT:
            raise ConfigError("--output -: a sweep goes on from what it has saved; name a file")
        if not sweeps:
            for flag, name in (("--grid", self.grid), ("--picture", self.picture)):
                if name is not None:
                    raise ConfigError(f"{flag} is for sweeps, which the suite {suite} is not")
        if self.picture:
            from textdiff.evaluate.presentation import require_matplotlib

            require_matplotlib()

    def read_grid(self) -> Mapping[str, Any] | None:
        """Return the grid's content.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.grid is None:
            return None
        from textdiff.data.plain_data import read_yaml

        content = read_yaml(self.grid, f"--grid {self.grid}")
        if not isinstance(content, dict):
            raise ConfigError(
                f"--grid {self.grid}: write `points:` there, and `baseline:` for the suite frontier"
            )
        return content

    def write(self, record: dict[str, Any], lines: Iterable[str], json_output: bool) -> None:
        """Write the result to the file that was named, and print it."""
        if self.output and self.output != STANDARD_OUTPUT:
            text = json.dumps(record, indent=1, ensure_ascii=False)
            # A path in the record may have bytes that are not UTF-8.
            self.output.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        if json_output or self.output == STANDARD_OUTPUT:
            print_json(record, indent=1)
        else:
            print("\n".join(lines))


def evaluate(
    model: str,
    /,
    *,
    measure: MeasureOptions,
    sampling: Sampling,
    sweep: SweepOptions,
    exam: ExamOptions,
    loading: Loading,
    suite: str = "generation",
    json_output: JsonFlag = False,
) -> int:
    """Measure the texts that a model generates, beside real ones; or with --tasks, sit an exam.

    docs/evaluation.md explains each figure of texts, docs/lm-eval.md those of tasks.

    Args:
        model: export or run directory, published checkpoint, or hub id.
        measure: texts to measure, and the judge that measures them.
        sampling: how text is drawn.
        sweep: settings that a sweep goes over.
        loading: how the model is loaded; the judge is on the same device.
        suite: generation, texts of one setting; frontier, perplexity and tokens per call over a
            grid of rules; likelihood-frontier, exact likelihood of the reference instead.
        json_output: print one JSON object, with everything that the result depends on.
    """
    if exam.tasks is not None:
        _refuse_suite(suite)
        return _evaluate_tasks(model, measure, sampling, sweep, exam, loading, json_output)
    _refuse_idle(exam, "is for --tasks")
    from textdiff.evaluate.suites import find_suite

    chosen = find_suite(suite)
    sweep.check(suite, chosen.sweeps)
    measure.check()
    result = _run(chosen, _suite_options(model, loading, measure, _free(sampling), sweep))
    sweep.write(result.record, result.lines, json_output)
    if sweep.picture:
        chosen.draw(result.record, sweep.picture)
    return 0


def _evaluate_tasks(
    model: str,
    measure: MeasureOptions,
    sampling: Sampling,
    sweep: SweepOptions,
    exam: ExamOptions,
    loading: Loading,
    json_output: bool,
) -> int:
    """Run the tasks of lm-evaluation-harness."""
    exam.check()
    _refuse_idle(
        measure, "is for texts, and --tasks asks questions", ("batch_size", "batch_tokens")
    )
    measure.check()
    sweep.check("of tasks", sweeps=False)
    if sampling.suffix:
        raise ConfigError("--suffix follows generated texts, and tasks have none: leave it out")
    options = {k: v for k, v in sampling.options().items() if k not in ("seed", "suffix")}
    options = options if sampling.stop else options | {"stop": None}
    asked = exam.exam(options, sampling.seed, measure.batch_size, measure.batch_tokens)
    result = sit_exam(model, loading, asked)
    if result is not None:
        sweep.write(*result, json_output)
    return 0


def _refuse_suite(suite: str) -> None:
    if suite != "generation":
        raise ConfigError(f"--suite {suite} and --tasks: give one of them", code="idle_flag")


def _refuse_idle(
    options: MeasureOptions | ExamOptions, why: str, used: tuple[str, ...] = ()
) -> None:
    """Refuse flags that would change nothing."""
    for field in fields(options):
        if field.name not in used and getattr(options, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise ConfigError(f"{flag} {why}: leave it out", code="idle_flag")


def _free(sampling: Sampling) -> dict[str, Any]:
    """Return options of texts that end by themselves."""
    if sampling.stop or sampling.suffix:
        raise ConfigError(
            f"{'--stop' if sampling.stop else '--suffix'} fixes how texts end, and free ones are "
            "measured: leave it out"
        )
    return {k: v for k, v in sampling.options().items() if k not in ("stop", "suffix")}


def _suite_options(
    model: str,
    loading: Loading,
    measure: MeasureOptions,
    options: dict[str, Any],
    sweep: SweepOptions,
) -> "SuiteOptions":
    """Load the model and the judge, and read the grid and the texts."""
    grid = sweep.read_grid()
    quiet_libraries()
    from textdiff.evaluate.suites import SuiteOptions

    return SuiteOptions(
        loading.load(model),
        model,
        options=options,
        num_samples=measure.num_samples,
        batch_size=measure.batch_size,
        given=measure.read(measure.texts),
        reference=measure.read(measure.reference),
        judge=measure.load_judge(loading.device),
        mauve=measure.mauve,
        resamples=measure.resamples,
        grid=grid,
        output=sweep.output,
        command=["textdiff", *sys.argv[1:]],
    )


def _run(suite: "Suite", options: "SuiteOptions") -> "SuiteResult":
    """Run a suite; report what an interruption leaves in its file."""
    try:
        with ProgressBar("evaluating") as progress:
            return suite.run(options, lambda stage, done, total: progress(done, total, stage))
    except KeyboardInterrupt:
        if suite.sweeps:
            kept = f"finished points are kept in {options.output}; the same command goes on there"
            print(kept, file=sys.stderr)
        raise
