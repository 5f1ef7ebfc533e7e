"""`textdiff generate --input`: a text, or several, for every line of a file of prompts."""

import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import (
    STANDARD_INPUT,
    check_standard_input,
    same_command,
    several_processes,
    standard_input,
    writable,
)
from textdiff.commands.parallel import Processes, find_processes
from textdiff.commands.sampling import read_template, say_approximate
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import BatchBar

if TYPE_CHECKING:
    from textdiff.batch.lines import OutputRow
    from textdiff.batch.output import Output
    from textdiff.pipeline import TextDiffusion

_SECONDS_BETWEEN_LOOKS = 0.5
_MOST_LINES = 10  # lines that cannot be used are named one by one, up to so many


@dataclass(frozen=True)
class Batch:
    """A file of prompts."""

    input: str | None = None
    """Generate for every line of this .jsonl file: {"prompt": ...}, with options of its own if it
    has any; other keys come back in the output. `-` reads standard input."""

    output: str | None = None
    """Write the results of --input to this .jsonl file, in the order of the input. An interrupted
    job goes on where it was. `-` writes to standard output, and keeps nothing to go on from."""

    @property
    def asked(self) -> bool:
        """True where a file of prompts is named."""
        return self.input is not None or self.output is not None

    def check(self, prompted: bool, plain: bool, *counts: int) -> None:
        """Refuse options that exclude each other, before a model runs.

        Args:
            prompted: whether the command line has a prompt, or names a file of one.
            plain: whether nothing is shown, recorded or printed as JSON.
            *counts: texts per line and rows per network call.

        Raises:
            ConfigError: with the flags.
        """
        if self.input is None or self.output is None:
            raise ConfigError("--input and --output belong together: give both")
        if prompted:
            raise ConfigError("a PROMPT, --template or --messages and --input exclude each other")
        if not plain:
            raise ConfigError("--input excludes --watch, --film, --trace and --json")
        if min(counts) < 1:
            raise ConfigError("--num-samples and --batch-size: give at least 1")
        check_standard_input([self.input])
        if self.input != "-" and not Path(self.input).exists():
            raise ConfigError(f"--input {self.input}: no such file; check the path")
        if self.input != "-" and Path(self.input).is_dir():
            raise ConfigError(f"--input {self.input} is a folder: name a file of JSON lines")
        if self.output != "-":
            writable("--output", Path(self.output))
        elif several_processes():
            raise ConfigError("--output -: several processes write to a file that they share")

    def content(self) -> bytes:
        """Return the content of the input.

        Raises:
            DataError: they cannot be read.
        """
        if self.input == "-":
            return standard_input().read()
        assert self.input is not None
        try:
            return Path(self.input).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.input}: {error.strerror}") from None

    @property
    def name(self) -> str:
        """Name of the input in messages."""
        return STANDARD_INPUT if self.input == "-" else str(self.input)

    def open(self, rows: int, rank: int) -> "Output":
        """Return the output of so many rows.

        Raises:
            DataError: it is standard output, which is closed.
        """
        from textdiff.batch.output import Output, StreamOutput

        assert self.output is not None
        if self.output != "-":
            return Output(Path(self.output), rows, rank)
        if sys.stdout is None:
            raise DataError("standard output is closed: name a file as --output")
        return StreamOutput(sys.stdout.buffer, "standard output", rows)


def _job_record(
    model: "TextDiffusion", content: bytes, options: Mapping[str, Any], num_samples: int
) -> dict[str, Any]:
    """Return all that the output depends on: no batches, devices, processes or exact caches."""
    from textdiff.export.records import model_record
    from textdiff.models.half_blocks import dtype_name

    return {
        "input_sha256": hashlib.sha256(content).hexdigest(),
        **model_record(model.folder),
        "block_size": model.family.block_size,
        "dtype": dtype_name(model.model),
        "defaults": model.defaults.to_export(),
        **options,
        "cache": "approximate" if options["cache"] == "approximate" else None,
        "num_samples": num_samples,
    }


def generate_batch(
    files: Batch,
    load: "Callable[[str | None], TextDiffusion]",
    options: Mapping[str, Any],
    num_samples: int,
    batch_size: int,
) -> int:
    """Generate, or go on generating; return 1 if a line could not be used.

    Args:
        files: input and output.
        load: loads the model on a device.
        options: of `TextDiffusion.prepare`, for lines without their own.
        num_samples: texts per line.
        batch_size: rows per network call.
    """
    from textdiff.batch.lines import LineDefaults, read_rows, template_files
    from textdiff.storage import file_hash
    from textdiff.train.directory import run_lock

    content, name = files.content(), files.name
    processes = find_processes()
    model = load(processes.device)
    unseeded = {key: value for key, value in options.items() if key != "seed"}
    defaults = LineDefaults(num_samples, options["seed"], unseeded, read_template)
    rows = read_rows(model, content, name, defaults)
    output = files.open(len(rows), processes.rank)
    with ExitStack() as stack:
        if processes.first:
            if files.output != "-":
                stack.enter_context(run_lock(output.folder, "--output", "writes"))
            facts = _job_record(model, content, options, num_samples)
            if templates := template_files(rows):
                facts["templates_sha256"] = file_hash(*templates)
            output.prepare(facts)
        processes.wait()
        output.load()
        processes.wait()
        stack.enter_context(output)
        if processes.first:
            _report_before(name, rows, output)
        try:
            _fill(model, rows, output, processes, batch_size)
        except KeyboardInterrupt:
            if processes.first:
                print(_how_to_go_on(files, output), file=sys.stderr)
            raise
    return _report_after(name, rows, output) if processes.first else 0


def _fill(
    model: "TextDiffusion",
    rows: "Sequence[OutputRow]",
    output: "Output",
    processes: Processes,
    batch_size: int,
) -> None:
    """Generate what is missing."""
    from textdiff.batch.output import fill

    share = (processes.rank, processes.count)
    with BatchBar("generating", len(rows), processes.first) as progress:
        progress(len(output.done), 0)
        fill(model, rows, output, batch_size=batch_size, share=share, progress=progress)
        while processes.first and not output.complete:  # others are not done yet
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            output.advance()
            progress(len(output.done), 0)


def _how_to_go_on(files: Batch, output: "Output") -> str:
    if files.output == "-":
        return f"{output.written} of {output.rows} rows were written; nothing is kept"
    same = " and the same standard input" if files.input == "-" else ""
    count = f"{len(output.done)} of {output.rows} rows are finished and kept"
    return f"{count}; go on with{same}\n  {same_command()}"


def _report_before(name: str, rows: "Sequence[OutputRow]", output: "Output") -> None:
    from textdiff.batch.lines import notes

    if output.done:
        print(f"{len(output.done)} of {len(rows)} rows are there already", file=sys.stderr)
    for note in notes(rows):
        print(f"note: {note}", file=sys.stderr)
    _print_lines(name, {row.line: row.error for row in rows if row.error is not None})
    _print_lines(name, {row.line: f"note: {'; '.join(row.lost)}" for row in rows if row.lost})
    caches = {row.request.config.cache for row in rows if row.request is not None}
    say_approximate("approximate" if "approximate" in caches else None)


def _report_after(name: str, rows: "Sequence[OutputRow]", output: "Output") -> int:
    """Report the lines that could not be used; return 1 if there are some."""
    failed = list(output.failures())
    errors = {record["line"]: record["error"] for record in failed}
    known = {row.line for row in rows if row.error is not None}
    _print_lines(name, {line: error for line, error in errors.items() if line not in known})
    print(f"{output.rows - len(failed)} texts are in {output.path}", file=sys.stderr)
    if not errors:
        return 0
    count = f"{len(errors)} line{'s' if len(errors) > 1 else ''} of {name}"
    print(f"textdiff: error: {count} could not be used; {output.path} says why", file=sys.stderr)
    return 1


def _print_lines(name: str, sentences: Mapping[int, str]) -> None:
    for line, sentence in list(sentences.items())[:_MOST_LINES]:
        print(f"{name} line {line}: {sentence}", file=sys.stderr)
    if len(sentences) > _MOST_LINES:
        print(f"... and {len(sentences) - _MOST_LINES} lines more", file=sys.stderr)
