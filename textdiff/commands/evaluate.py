"""`textdiff evaluate`: how good the texts of a model are, beside real ones."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import (
    BlockSize,
    Dtype,
    JsonFlag,
    ModelArgument,
    held_model,
)
from textdiff.commands.inputs import check_standard_input, read_documents
from textdiff.commands.sampling import Sampling
from textdiff.errors import ConfigError, first_line
from textdiff.view.progress import ProgressBar, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.evaluate.judge import Judge
    from textdiff.evaluate.plan import Outcome, Plan
    from textdiff.evaluate.suites import Suite


@dataclass(frozen=True)
class Material:
    """What is measured, and by what."""

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

    def check(self) -> None:
        """Refuses values out of range, and what is not installed, before anything is loaded.

        Raises:
            ConfigError: with the flag.
        """
        check_standard_input((*self.texts, *self.reference))
        if self.batch_tokens < 1:
            raise ConfigError(f"--batch-tokens {self.batch_tokens}: give at least 1")
        if self.mauve:
            from textdiff.evaluate.mauve import require

            require()

    def load_judge(self, device: str | None) -> "Judge | None":
        """The judge, if one was named.

        Args:
            device: torch device, known to exist.

        Raises:
            CheckpointError: it cannot be loaded.
            ConfigError: its likelihood is not exact.
        """
        if self.judge is None:
            return None
        from textdiff.evaluate.judge import load_judge

        return load_judge(self.judge, device, self.judge_dtype, self.batch_tokens)

    def read(self, names: tuple[str, ...]) -> list[str] | None:
        """The documents of files; None where none are named."""
        return list(read_documents(names, self.text_column)) if names else None


STANDARD_OUTPUT = Path("-")


@dataclass(frozen=True)
class Sweep:
    """What a sweep goes over, and where results go."""

    grid: Path | None = None
    """YAML file with the settings of the suite frontier; docs/evaluation.md shows one."""

    output: Path | None = None
    """Write the result to this JSON file; the suite frontier saves every point there, and goes on
    from it when it is started again. `-`: standard output, as --json."""

    picture: Path | None = None
    """Draw the suite frontier into this PNG file."""

    def check(self, suite: str, sweeps: bool) -> None:
        """Refuses what does not go together, before anything is loaded.

        Raises:
            ConfigError: with the flag.
        """
        for flag, name in (("--output", self.output), ("--picture", self.picture)):
            path = name or Path("result.json")
            if path.is_dir() or not path.parent.is_dir():
                raise ConfigError(f"{flag} {path}: name a file in a folder that exists")
        if sweeps and self.output == STANDARD_OUTPUT:
            raise ConfigError("--output -: a sweep goes on from what it has saved; name a file")
        if not sweeps:
            for flag, name in (("--grid", self.grid), ("--picture", self.picture)):
                if name is not None:
                    raise ConfigError(f"{flag} is for sweeps, and the suite {suite} is none")
        if self.picture:
            from textdiff.evaluate.picture import require

            require()

    def read_grid(self) -> Mapping[str, Any] | None:
        """The grid's content.

        Raises:
            ConfigError: it cannot be read.
        """
        if self.grid is None:
            return None
        from textdiff.config.plain_data import parse_yaml

        try:
            text = self.grid.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--grid {self.grid} cannot be read ({first_line(error)})") from None
        found = parse_yaml(text, f"--grid {self.grid}")
        if not isinstance(found, dict):
            raise ConfigError(f"--grid {self.grid}: write `baseline:` and `points:` there")
        return found

    def write(self, record: dict[str, Any]) -> None:
        """Writes the result where it was asked for."""
        if self.output and self.output != STANDARD_OUTPUT:
            text = json.dumps(record, indent=1, ensure_ascii=False)
            # A path in the record may have bytes that are not UTF-8.
            self.output.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
        if self.picture:
            from textdiff.evaluate.picture import draw

            draw(record, self.picture)


def evaluate(
    model: ModelArgument,
    /,
    *,
    material: Material,
    sampling: Sampling,
    sweep: Sweep,
    suite: str = "generation",
    num_samples: int = 64,
    batch_size: int = 16,
    block_size: BlockSize = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    json_output: JsonFlag = False,
) -> int:
    """Measure the texts that a model generates, beside real ones.

    docs/evaluation.md says what each figure means, and which may be compared.

    Args:
        model: export directory, run directory or hub id.
        material: what is measured, and by what.
        sampling: how text is drawn.
        sweep: what a sweep goes over.
        suite: generation, texts of one setting; or frontier, perplexity, entropy and tokens per
            call over a grid of rules, steps and temperatures.
        num_samples: texts to generate.
        batch_size: texts generated together (they do not depend on it).
        block_size: tokens per block, of those that the model was trained in, or full; the default
            is the first of them.
        device: torch device, of the judge too; the default is CUDA if there is one, else the CPU.
        dtype: dtype of the network.
        json_output: print one JSON object, with everything that the result depends on.
    """
    from textdiff.evaluate.suites import find_suite

    chosen = find_suite(suite)
    sweep.check(suite, chosen.sweeps)
    material.check()
    for flag, value in (("--stop", sampling.stop), ("--suffix", sampling.suffix)):
        if value:
            raise ConfigError(
                f"{flag} fixes how texts end, and free ones are measured: leave it out"
            )
    options = {k: v for k, v in sampling.options().items() if k not in ("stop", "suffix")}
    grid = sweep.read_grid()
    quiet_libraries()
    from textdiff.evaluate.plan import Plan

    plan = Plan(
        held_model(model, device, dtype, block_size),
        model,
        options=options,
        num_samples=num_samples,
        batch_size=batch_size,
        given=material.read(material.texts),
        reference=material.read(material.reference),
        judge=material.load_judge(device),
        mauve=material.mauve,
        resamples=material.resamples,
        grid=grid,
        output=sweep.output,
        command=["textdiff", *sys.argv[1:]],
    )
    found = _run(chosen, plan)
    sweep.write(found.record)
    if json_output or sweep.output == STANDARD_OUTPUT:
        print_json(found.record, indent=1)
    else:
        print("\n".join(found.lines))
    return 0


def _run(suite: "Suite", plan: "Plan") -> "Outcome":
    """Runs a suite; an interruption says what is kept."""
    bar = ProgressBar("evaluating")
    try:
        with bar as progress:

            def tell(what: str, done: int, total: int) -> None:
                bar.rename(what)
                progress(done, total)

            return suite.run(plan, tell)
    except KeyboardInterrupt:
        if suite.sweeps:
            kept = f"finished points are kept in {plan.output}; the same command goes on from there"
            print(kept, file=sys.stderr)
        raise
