"""`textdiff perplexity`: what a model makes of texts, as a number with its error."""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import JsonFlag, ModelArgument, TextArgument, held_model
from textdiff.commands.inputs import given_rows
from textdiff.commands.processes import Processes, find_processes
from textdiff.commands.scoring import Reading, Scoring, state_path
from textdiff.errors import ConfigError, DataError
from textdiff.view.progress import ProgressBar, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.likelihood import Estimates
    from textdiff.pipeline import TextDiffusion


@dataclass(frozen=True)
class Task:
    """What is scored and where it goes."""

    protocol: str = "none"
    """Follow a published evaluation, sedd, mdlm or bd3lm, for comparison with its figures: its
    chunks, special tokens and estimator; what is biased in it is printed."""

    prompt_column: str | None = None
    """Key of a prompt in .jsonl files: the text is scored given its prompt."""

    spans_column: str | None = None
    """Key of a list of [start, end] characters in .jsonl files: these are scored given the rest."""

    per_document: Path | None = None
    """Write one JSON line per document to this file; each then draws noise often enough for an
    error of its own."""

    per_token: bool = False
    """Add the nats of every token to the lines of --per-document."""

    state: str | None = None
    """Save finished replicates to this file, and go on from it."""

    @property
    def published(self) -> str | None:
        """The protocol, if one is followed."""
        return None if self.protocol == "none" else self.protocol

    def check(self, reading: Reading) -> None:
        """Refuses choices that exclude each other.

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
        output = self.per_document or Path("lines.jsonl")
        if output.is_dir() or not output.parent.is_dir():
            raise ConfigError(f"--per-document {output}: name a file in a folder that exists")

    def read(self, names: Sequence[str], reading: Reading) -> dict[str, Any]:
        """The arguments of `TextDiffusion.estimate` that say what is scored.

        Raises:
            DataError: a place that holds no usable text.
        """
        column = self.prompt_column or self.spans_column
        if column is None:
            return {"texts": reading.texts(names), "protocol": self.published}
        from textdiff.data.conditional import read_conditional

        reading.check(names)
        spans = self.spans_column is not None
        rows = read_conditional(given_rows(names), reading.text_column, column, spans)
        pairs = list(islice(rows, reading.max_documents))
        if not pairs:
            raise DataError(f"{', '.join(names)}: holds no text")
        texts, others = zip(*pairs, strict=True)
        return {"texts": texts, "spans" if spans else "prompts": others}


def perplexity(
    model: ModelArgument,
    text: TextArgument,
    /,
    scoring: Scoring,
    reading: Reading,
    task: Task,
    json_output: JsonFlag = False,
) -> int:
    """Bound the perplexity of texts: unbiased, with its Monte-Carlo error.

    Documents longer than the model's context are cut into windows that do not see each other; with
    --stride they overlap. Start it with `accelerate launch -m textdiff perplexity ...` to share the
    work among processes.

    Args:
        model: export directory, run directory or hub id.
        text: files, folders or patterns: text, or rows (.jsonl, .csv, .parquet, ...), compressed or
            not; `-` reads standard input.
        scoring: how texts are scored.
        reading: what is read.
        task: what is scored.
        json_output: print one JSON object, with everything that the result depends on.
    """
    options, state = scoring.options(), state_path(task.state)
    task.check(reading)
    quiet_libraries()
    scored = task.read(text, reading)
    from textdiff.evaluate import evaluation_record

    processes = find_processes()
    device = scoring.device or processes.device
    held = held_model(model, device, scoring.dtype, scoring.block_size)
    each = task.per_document is not None
    options |= {"each_document": each, "attribute": task.per_token, "state": state}
    estimates = _estimate(held, scored | options, processes, state)
    if not processes.first:
        return 0
    record = {"model": model, "precision": options["precision"]} | evaluation_record(
        held,
        estimates,
        seed=scoring.seed,
        options=scoring.estimator_options(),
        protocol=task.published,
        stride=scoring.stride,
        detokenizer=reading.detokenizer,
        processes=processes.count,
        command=["textdiff", *sys.argv[1:]],
    )
    if task.per_document:
        _write_documents(task.per_document, held, estimates, task.per_token)
    if json_output:
        print_json(record)
    else:
        _show(held, estimates, record)
    return 0


def _estimate(
    held: "TextDiffusion", options: dict[str, Any], processes: Processes, state: Path | None
) -> "Estimates":
    """Runs the estimate; an interruption says what is kept."""
    try:
        with ProgressBar("scoring windows", processes.first) as progress:
            return held.estimate(
                **options,
                shard=(processes.rank, processes.count),
                reduce=processes.reduce,
                progress=progress,
            )
    except KeyboardInterrupt:
        if processes.first:
            print(_how_to_go_on(state), file=sys.stderr)
        raise


def _how_to_go_on(state: Path | None) -> str:
    if state is None:
        return "nothing was kept; with --state FILE finished replicates are"
    if not state.exists():
        return f"no replicate was finished, so {state} was not written"
    again = shlex.join(["textdiff", *sys.argv[1:]])
    return f"finished replicates are kept in {state}; go on with\n  {again}"


def _show(held: "TextDiffusion", estimates: "Estimates", record: dict[str, Any]) -> None:
    from textdiff.view.bounds import bound_lines, exact_hint

    for line in bound_lines(estimates, record):
        print(line)
    for line in exact_hint(held, estimates, record["provenance"]["processes"]):
        print(line)


def _write_documents(
    path: Path, held: "TextDiffusion", estimates: "Estimates", per_token: bool
) -> None:
    """One line per document; one without a token has null for its figures."""
    from textdiff.evaluate.documents import document_records

    with path.open("w", encoding="utf-8") as file:
        for line in document_records(held, estimates, per_token):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
