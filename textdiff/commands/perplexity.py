"""`textdiff perplexity`: a bound on the perplexity of texts, with its error."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import JsonFlag, Loading, given_rows, same_command, writable
from textdiff.commands.parallel import Processes, find_processes
from textdiff.commands.scoring import (
    ReadingOptions,
    ScoringOptions,
    bound_record,
    shared_estimate,
    state_path,
)
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.likelihood.estimates import Estimates
    from textdiff.pipeline import TextDiffusion


@dataclass(frozen=True)
class TaskOptions:
    """Texts to score, and files for results."""

    protocol: str = "none"
    """Follow a published evaluation, sedd, mdlm or bd3lm, for comparison with its figures: its
    chunks, special tokens and estimator; what is biased in it is printed."""

    prompt_column: str | None = None
    """Key of a prompt in .jsonl files: the text is scored conditional on its prompt."""

    spans_column: str | None = None
    """Key of a list of [start, end] characters in .jsonl files: these are scored conditional on the
    rest."""

    per_document: Path | None = None
    """Write one JSON line per document to this file; each then draws noise often enough for an
    error of its own."""

    per_token: bool = False
    """Add the nats of every token to the lines of --per-document."""

    state: str | None = None
    """Save finished replicates to this file, and go on from it."""

    @property
    def published(self) -> str | None:
        """Name of the published protocol, if one is followed."""
        return None if self.protocol == "none" else self.protocol

    def check(self, reading: ReadingOptions) -> None:
        """Refuse choices that exclude each other.

        Raises:
            ConfigError: with the flags.
        """
        if self.prompt_column and self.spans_column:
            raise ConfigError("--prompt-column and --spans-column exclude each other")
        if (self.prompt_column or self.spans_column) and reading.detokenizer != "none":
            raise ConfigError("--detokenizer changes whole texts; leave it out with prompts, spans")
        if (self.prompt_column or self.spans_column) and self.published:
            raise ConfigError(f"--protocol {self.protocol} scores whole texts, without prompts")
        if self.published and self.per_document:
            raise ConfigError(f"--protocol {self.protocol} scores chunks: no --per-document")
        if self.per_token and not self.per_document:
            raise ConfigError("--per-token needs --per-document FILE to write to")
        if str(self.per_document) == "-":
            raise ConfigError("--per-document -: name a file; the result is on standard output")
        writable("--per-document", self.per_document)

    def read(self, names: Sequence[str], reading: ReadingOptions) -> dict[str, Any]:
        """Return the texts, prompts and spans for `TextDiffusion.estimate`.

        Raises:
            DataError: a place that holds no usable text.
        """
        column = self.prompt_column or self.spans_column
        if column is None:
            return reading.documents(names)
        from textdiff.data.json_rows import read_conditional

        reading.check(names)
        spans = self.spans_column is not None
        rows = read_conditional(given_rows(names), reading.text_column, column, spans)
        pairs = list(islice(rows, reading.max_documents))
        if not pairs:
            raise DataError(f"{', '.join(names)}: holds no text")
        texts, others = zip(*pairs, strict=True)
        return {"texts": texts, "spans" if spans else "prompts": others}


def perplexity(
    model: str,
    text: tuple[str, ...],
    /,
    scoring: ScoringOptions,
    reading: ReadingOptions,
    task: TaskOptions,
    loading: Loading,
    json_output: JsonFlag = False,
) -> int:
    """Bound the perplexity of texts: unbiased, with its Monte-Carlo error.

    Documents longer than the model's context are cut into independent windows; with --stride they
    overlap. Of rows that are conversations the answers are scored, given what comes before. Start
    it with `accelerate launch -m textdiff perplexity ...` to share the work among processes.

    Args:
        model: export or run directory, published checkpoint, or hub id.
        text: files, folders or patterns: text, or rows (.jsonl, .csv, .parquet, ...), compressed or
            not; `-` reads standard input.
        scoring: how texts are scored.
        reading: how files are read.
        task: texts to score, and files for results.
        loading: how the model is loaded.
        json_output: print one JSON object, with everything that the result depends on.
    """
    options, state = scoring.options(task.published), state_path(task.state)
    task.check(reading)
    quiet_libraries()
    run = options | task.read(text, reading) | {"state": state, "attribute": task.per_token}
    run["each_document"] = task.per_document is not None
    processes = find_processes()
    held = loading.load(model, processes.device)
    with _reported(state, processes):
        estimates = shared_estimate(held, "scoring windows", processes, run)
    if processes.first:
        record = {"model": model, "precision": options["precision"]}
        record |= bound_record(held, estimates, options, reading, processes)
        _report(held, estimates, record, task, json_output)
    return 0


@contextmanager
def _reported(state: Path | None, processes: Processes) -> Iterator[None]:
    """Report what an interruption leaves in the file of replicates."""
    try:
        yield
    except KeyboardInterrupt:
        if processes.first:
            print(_how_to_go_on(state), file=sys.stderr)
        raise


def _how_to_go_on(state: Path | None) -> str:
    if state is None:
        return "nothing was kept; with --state FILE finished replicates are"
    if not state.exists():
        return f"no replicate was finished, so {state} was not written"
    return f"finished replicates are kept in {state}; go on with\n  {same_command()}"


def _report(
    held: "TextDiffusion",
    estimates: "Estimates",
    record: dict[str, Any],
    task: TaskOptions,
    json_output: bool,
) -> None:
    """Write one line per document, if asked to, and print the result."""
    from textdiff.view.bounds import bound_lines, exact_hint

    if task.per_document:
        _write_documents(task.per_document, held, estimates, task.per_token)
    if json_output:
        print_json(record)
        return
    hints = exact_hint(held, estimates, record["provenance"]["processes"])
    print(*bound_lines(estimates, record), *hints, sep="\n")


def _write_documents(
    path: Path, held: "TextDiffusion", estimates: "Estimates", per_token: bool
) -> None:
    """Write one line per document; one without a token has null for its figures."""
    from textdiff.evaluate.bound_record import document_records

    with path.open("w", encoding="utf-8") as file:
        for line in document_records(held, estimates, per_token):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
