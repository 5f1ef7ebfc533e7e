"""`textdiff compare`: the difference of two models' bounds on a text, under the same noise."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from textdiff.commands.arguments import JsonFlag, Loading
from textdiff.commands.parallel import find_processes
from textdiff.commands.scoring import (
    ReadingOptions,
    ScoringOptions,
    bound_record,
    shared_estimate,
)
from textdiff.view.progress import print_json, quiet_libraries

if TYPE_CHECKING:
    from textdiff.likelihood.difference import Difference
    from textdiff.likelihood.estimates import Estimates


def compare(
    model_a: str,
    model_b: str,
    text: tuple[str, ...],
    /,
    scoring: ScoringOptions,
    reading: ReadingOptions,
    loading: Loading,
    json_output: JsonFlag = False,
) -> int:
    """Compare two models on the same texts, with the error of the difference.

    Both use the same noise, so most of the Monte-Carlo error cancels. The difference is in nats per
    token where both models cut the texts into the same tokens and windows, else in bits per byte.

    Args:
        model_a: export or run directory, published checkpoint, or hub id.
        model_b: the model that is subtracted.
        text: files, folders or patterns: text, or rows (.jsonl, .csv, .parquet, ...), compressed or
            not; `-` reads standard input.
        scoring: how texts are scored.
        reading: how files are read.
        loading: how the models are loaded.
        json_output: print one JSON object, with everything that the result depends on.
    """
    options = scoring.options()  # refuses what is wrong before anything is loaded
    quiet_libraries()
    run = options | reading.documents(text)
    from textdiff.likelihood.difference import compare_models

    processes, names = find_processes(), (model_a, model_b)
    records: dict[int, dict[str, Any]] = {}

    def score(place: int, replicates: int) -> "Estimates":
        name = names[place]
        held, run["replicates"] = loading.load(name, processes.device), replicates
        estimates = shared_estimate(held, f"scoring by {name}", processes, run)
        record = bound_record(held, estimates, options, reading, processes)
        records[place] = {"model": name} | record
        return estimates

    result, both = compare_models(partial(score, 0), partial(score, 1), scoring.replicates)
    if processes.first and json_output:
        print_json({"difference": _record(result), "models": [records[0], records[1]]})
    elif processes.first:
        _show(names, both, result)
    return 0


def _record(result: "Difference") -> dict[str, Any]:
    from textdiff.likelihood.bound import finite

    return asdict(result) | {
        "stderr": result.stderr if result.is_reliable else None,
        "is_reliable": result.is_reliable,
        "interval_95": [finite(end) for end in result.interval()],
    }


def _show(
    names: tuple[str, str], both: "tuple[Estimates, Estimates]", result: "Difference"
) -> None:
    from textdiff.view.bounds import difference_lines
    from textdiff.view.training import describe_bound

    for name, estimates in zip(names, both, strict=True):
        bound = estimates.bound()
        note = f" (NOT a bound: {bound.note})" if bound.note else ""
        print(f"{name}: {describe_bound(bound)}{note}")
    for line in difference_lines(result, *names):
        print(line)
