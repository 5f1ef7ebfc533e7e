"""`textdiff compare`: which of two models a text prefers, under the same noise."""

import sys
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import JsonFlag, TextArgument, held_model
from textdiff.commands.processes import find_processes
from textdiff.commands.scoring import Reading, Scoring
from textdiff.view.progress import ProgressBar, print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.likelihood import Difference, Estimates


def compare(
    model_a: str,
    model_b: str,
    text: TextArgument,
    /,
    scoring: Scoring,
    reading: Reading,
    json_output: JsonFlag = False,
) -> int:
    """Compare two models on the same texts, with the error of the difference.

    Both see the same noise, so most of the Monte-Carlo error cancels. The difference is in nats per
    token where both models cut the texts into the same tokens and windows, else in bits per byte.

    Args:
        model_a: export directory, run directory or hub id.
        model_b: the model that is subtracted.
        text: files, folders or patterns: text, or rows (.jsonl, .csv, .parquet, ...), compressed or
            not; `-` reads standard input.
        scoring: how texts are scored.
        reading: what is read.
        json_output: print one JSON object, with everything that the result depends on.
    """
    scoring.options()  # says what is wrong before anything is loaded
    quiet_libraries()
    texts = reading.texts(text)
    from textdiff.likelihood import compare as difference
    from textdiff.likelihood import paired
    from textdiff.view.bounds import difference_lines

    processes = find_processes()
    records: dict[int, dict[str, Any]] = {}

    def scored(place: int, name: str, replicates: int) -> "Estimates":
        estimates, records[place] = _score(name, texts, scoring, reading, replicates)
        return estimates

    found = paired(partial(scored, 0, model_a), partial(scored, 1, model_b), scoring.replicates)
    per_byte = found[0].windows.digest != found[1].windows.digest
    result = difference(*found, per_byte=per_byte)
    if not processes.first:
        return 0
    if json_output:
        print_json(_record(result, [records[0], records[1]]))
        return 0
    for name, estimates in zip((model_a, model_b), found, strict=True):
        _show(name, estimates)
    for line in difference_lines(result, model_a, model_b):
        print(line)
    return 0


def _score(
    name: str, texts: list[str], scoring: Scoring, reading: Reading, replicates: int
) -> "tuple[Estimates, dict[str, Any]]":
    """One model's estimates in at least so many replicates, and what they depend on."""
    from textdiff.evaluate import evaluation_record

    processes = find_processes()
    device = scoring.device or processes.device
    held = held_model(name, device, scoring.dtype, scoring.block_size)
    with ProgressBar(f"scoring by {name}", processes.first) as progress:
        estimates = held.estimate(
            texts,
            **(scoring.options() | {"replicates": replicates}),
            shard=(processes.rank, processes.count),
            reduce=processes.reduce,
            progress=progress,
        )
    record = evaluation_record(
        held,
        estimates,
        seed=scoring.seed,
        options=scoring.estimator_options(),
        stride=scoring.stride,
        detokenizer=reading.detokenizer,
        processes=processes.count,
        command=["textdiff", *sys.argv[1:]],
    )
    return estimates, {"model": name} | record


def _record(result: "Difference", records: list[dict[str, Any]]) -> dict[str, Any]:
    from textdiff.likelihood.bound import finite

    found = asdict(result) | {
        "stderr": result.stderr if result.is_reliable else None,
        "is_reliable": result.is_reliable,
        "interval_95": [finite(end) for end in result.interval()],
    }
    return {"difference": found, "models": records}


def _show(name: str, estimates: "Estimates") -> None:
    from textdiff.view.training import describe_bound

    bound = estimates.bound()
    note = f" (NOT a bound: {bound.note})" if bound.note else ""
    print(f"{name}: {describe_bound(bound)}{note}")
