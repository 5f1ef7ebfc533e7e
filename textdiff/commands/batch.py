"""`textdiff generate --input`: a text, or several, for every line of a file of prompts."""

import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import ShowingOptions, writable
from textdiff.commands.inputs import (
    STANDARD_INPUT,
    check_standard_input,
    several_processes,
    standard_input,
)
from textdiff.commands.processes import Processes, find_processes
from textdiff.commands.sampling import read_template, say_approximate
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import BatchBar

if TYPE_CHECKING:
    from textdiff.batch.output import Output
    from textdiff.batch.requests import Request
    from textdiff.pipeline import TextDiffusion

_SECONDS_BETWEEN_LOOKS = 0.5
_TOLD = 10  # lines that cannot be used are named one by one, up to so many


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
        """Whether there is a file of prompts."""
        return self.input is not None or self.output is not None

    def check(
        self, prompt: str, showing: ShowingOptions, json_output: bool, counts: Sequence[int]
    ) -> None:
        """Refuses what does not go together, before a model runs.

        Raises:
            ConfigError: with the flags.
        """
        if self.input is None or self.output is None:
            raise ConfigError("--input and --output belong together: give both")
        if prompt:
            raise ConfigError("a PROMPT or --template and --input exclude each other")
        if showing != ShowingOptions() or json_output:
            raise ConfigError("--input excludes --watch, --film, --trace and --json")
        if min(counts) < 1:
            raise ConfigError("--num-samples and --batch-size: give at least 1")
        check_standard_input([self.input])
        if self.input != "-" and not Path(self.input).exists():
            raise ConfigError(f"--input {self.input}: there is no such file")
        if self.input != "-" and Path(self.input).is_dir():
            raise ConfigError(f"--input {self.input} is a folder: name a file of JSON lines")
        if self.output != "-":
            writable("--output", Path(self.output))
        elif several_processes():
            raise ConfigError("--output -: several processes write to a file that they share")

    def content(self) -> bytes:
        """The lines of the input.

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
        """The input in messages."""
        return STANDARD_INPUT if self.input == "-" else str(self.input)

    def open(self, rows: int, rank: int) -> "Output":
        """The output of so many rows.

        Raises:
            DataError: it is standard output, which is closed.
        """
        from textdiff.batch.output import Output
        from textdiff.batch.stream import StreamOutput

        assert self.output is not None
        if self.output != "-":
            return Output(Path(self.output), rows, rank)
        if sys.stdout is None:
            raise DataError("standard output is closed: name a file as --output")
        return StreamOutput(sys.stdout.buffer, "standard output", rows)


def generate_batch(
    name: str,
    batch: Batch,
    options: Mapping[str, Any],
    *,
    num_samples: int,
    batch_size: int,
    held: "Callable[[str | None], TextDiffusion]",
) -> int:
    """Generates, or goes on generating; 1 if a line could not be used.

    Args:
        name: the model as the user calls it.
        batch: the files.
        options: of `TextDiffusion.generate`.
        num_samples: texts per line.
        batch_size: rows per network call.
        held: loads the model on a device.
    """
    from textdiff.batch.requests import LineDefaults, read_requests, template_files
    from textdiff.storage import file_hash
    from textdiff.train.directory import run_lock

    content = batch.content()
    processes = find_processes()
    model = held(processes.device)
    wanted = dict(options)
    cache, seed = wanted.pop("cache"), wanted.pop("seed")
    job = LineDefaults(num_samples, seed, cache, wanted, read_template)
    requests = read_requests(model, content, batch.name, job)
    output = batch.open(len(requests), processes.rank)
    with ExitStack() as stack:
        if processes.first:
            if batch.output != "-":
                stack.enter_context(run_lock(output.folder, "--output", "writes"))
            facts = _job(model, content, options, num_samples)
            if templates := template_files(requests):
                facts["templates_sha256"] = file_hash(*templates)
            output.prepare(facts)
        processes.wait()
        output.load()
        processes.wait()
        stack.enter_context(output)
        if processes.first:
            _say_before(batch.name, requests, output)
            caches = {request.cache for request in requests}
            say_approximate("approximate" if "approximate" in caches else None)
        try:
            _fill(model, requests, output, processes, batch_size=batch_size)
        except KeyboardInterrupt:
            if processes.first:
                print(_how_to_go_on(batch, requests, output), file=sys.stderr)
            raise
    return _say_after(batch.name, requests, output) if processes.first else 0


def _job(
    model: "TextDiffusion", content: bytes, options: Mapping[str, Any], num_samples: int
) -> dict[str, Any]:
    """All that the output depends on: neither batches, devices and processes nor an exact cache."""
    from textdiff.export.provenance import model_record

    cache = "approximate" if options["cache"] == "approximate" else None
    return {
        "input_sha256": hashlib.sha256(content).hexdigest(),
        **model_record(model.folder),
        "block_size": model.family.block_size,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "defaults": asdict(model.defaults),
        **options,
        "cache": cache,
        "num_samples": num_samples,
    }


def _fill(
    model: "TextDiffusion",
    requests: "Sequence[Request]",
    output: "Output",
    processes: Processes,
    *,
    batch_size: int,
) -> None:
    """Generates what is missing."""
    from textdiff.batch.run import fill

    with BatchBar("generating", len(requests), processes.first) as progress:
        progress(len(output.done), 0)
        fill(
            model,
            requests,
            output,
            batch_size=batch_size,
            share=(processes.rank, processes.count),
            progress=progress,
        )
        while processes.first and not output.complete:  # others are not done yet
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            output.advance()
            progress(len(output.done), 0)


def _how_to_go_on(batch: Batch, requests: "Sequence[Request]", output: "Output") -> str:
    if batch.output == "-":
        return f"{output.written} of {len(requests)} rows were written; nothing is kept"
    again = shlex.join(["textdiff", *sys.argv[1:]])
    same = " and the same standard input" if batch.input == "-" else ""
    count = f"{len(output.done)} of {len(requests)} rows are finished and kept"
    return f"{count}; go on with{same}\n  {again}"


def _say_before(name: str, requests: "Sequence[Request]", output: "Output") -> None:
    from textdiff.batch.requests import notes

    if output.done:
        print(f"{len(output.done)} of {len(requests)} rows are there already", file=sys.stderr)
    for note in notes(requests):
        print(f"note: {note}", file=sys.stderr)
    _say_errors(name, {r.line: r.error for r in requests if r.error is not None})
    lost = {r.line: "; ".join(r.order.lost) for r in requests if r.order and r.order.lost}
    _say_errors(name, {line: f"note: {said}" for line, said in lost.items()})


def _say_after(name: str, requests: "Sequence[Request]", output: "Output") -> int:
    """What became of the lines; 1 if some could not be used."""
    failed = list(output.failures())
    found = {row["line"]: row["error"] for row in failed}
    known = {request.line for request in requests if request.error is not None}
    _say_errors(name, {line: error for line, error in found.items() if line not in known})
    print(f"{output.rows - len(failed)} texts are in {output.path}", file=sys.stderr)
    if not found:
        return 0
    count = f"{len(found)} line{'s' if len(found) > 1 else ''} of {name}"
    print(f"textdiff: error: {count} could not be used; {output.path} says why", file=sys.stderr)
    return 1


def _say_errors(name: str, errors: Mapping[int, str]) -> None:
    for line, error in list(errors.items())[:_TOLD]:
        print(f"{name} line {line}: {error}", file=sys.stderr)
    if len(errors) > _TOLD:
        print(f"... and {len(errors) - _TOLD} lines more", file=sys.stderr)
