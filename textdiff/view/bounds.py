"""A bound in plain words, for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from textdiff.errors import ConfigError
from textdiff.likelihood.difference import Difference
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import ESTIMATORS, build_estimator, default_estimator
from textdiff.likelihood.protocols import find_protocol
from textdiff.likelihood.stopping import MAX_REPLICATES
from textdiff.pipeline import TextDiffusion
from textdiff.view.training import describe_bound, format_perplexity

STRIDE_HINT = "give --stride to let windows overlap"


def bound_lines(estimates: Estimates, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that `textdiff perplexity` prints.

    Args:
        estimates: the result.
        record: the same as `evaluation_record`, with the `precision` asked for.
    """
    bound = estimates.bound()
    yield describe_bound(bound)
    parts = ", ".join(f"{name} {value:.4f}" for name, value in bound.terms.items())
    yield f"its terms in nats/token: {parts}"
    yield from _interval(estimates, record)
    if bound.text_stderr is not None:
        what = "chunks" if record["protocol"] != "none" else "documents"
        yield f"standard error over {bound.documents} {what}: {bound.text_stderr:.4f} nats/token"
    yield (
        f"{bound.tokens:,} tokens, {bound.bytes:,} bytes; estimator {bound.estimator}, "
        f"{bound.replicates} replicate(s){_planned(bound.pilot)}, seed {record['seed']}; "
        f"weights: {record['provenance']['weights']}"
    )
    if estimates.calls:
        yield f"the rule takes {estimates.calls_per_token:.4f} network calls of a row per token"
    yield from _windows(estimates, record)
    if record["end_of_text"]:
        yield (
            "the end of every document is scored and not counted among the tokens; "
            "what follows it in its block stays masked"
        )
    yield from _verdict(estimates, record)


def _interval(estimates: Estimates, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the Monte-Carlo error, or why there is none."""
    bound = estimates.bound()
    if estimates.exact:
        yield "no Monte-Carlo error: this estimator draws nothing"
    elif bound.doubt:
        yield f"no 95 % interval and no error: {bound.doubt}"
    else:
        low, high = bound.perplexity_interval()
        yield (
            f"95 % interval of the perplexity (Monte-Carlo error): {format_perplexity(low)} to "
            f"{format_perplexity(high)}"
        )
        if caveat := ESTIMATORS[bound.estimator].caveat:
            yield f"about this interval: {caveat}"
        wanted = record["precision"]
        if wanted is not None and high > bound.perplexity * (1.0 + wanted) * (1.0 + 1e-9):
            yield (
                f"this is wider than the precision of {wanted:.3g} asked for: no more than "
                f"{MAX_REPLICATES} replicates are planned"
            )


def _planned(pilot: int) -> str:
    return f" planned from {pilot} others, whose spread is the error" if pilot else ""


def _windows(estimates: Estimates, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield how documents longer than the context were cut."""
    per_document = estimates.windows.document.bincount()
    long = int((per_document > 1).sum())
    if not long:
        return
    context, stride = record["context"], record["stride"]
    how = (
        f"windows do not see each other; {STRIDE_HINT}"
        if stride is None
        else f"a window every {stride} tokens sees what it shares with the one before"
    )
    documents = len(estimates.windows.document_tokens)
    yield f"{long} of {documents} documents longer than {context} tokens: {how}"


def _verdict(estimates: Estimates, record: Mapping[str, Any]) -> Iterator[str]:
    """Yield whether the number is a bound, and what is missing or biased where it is not."""
    bound = estimates.bound()
    if bound.impossible:
        yield (
            f"the rule never writes {bound.impossible} of {bound.documents} documents: they have "
            "probability 0 (--per-document says which)"
        )
    if bound.note:
        yield f"NOT a bound: {bound.note}"
    elif estimates.exact:
        yield f"an exact value; docs/bounds.md says of what ({bound.estimator})"
    else:
        of = "" if record["protocol"] == "none" else " of these chunks"
        yield f"an upper bound on the perplexity{of}, in expectation"
    if record["protocol"] == "none":
        return
    protocol = find_protocol(record["protocol"])
    yield f"protocol {protocol.name}, for comparison with published figures; what is biased in it:"
    for bias in record["biases"]:
        yield f"  - {bias}"
    if bound.estimator != protocol.estimator or bound.doubt:
        return
    one = bound.stderr * bound.replicates**0.5
    times = f"{protocol.draws:,} draws" if protocol.draws > 1 else "one draw"
    yield (
        f"published figures take {times} per chunk and give no error; a single draw here has a "
        f"standard error of {one:.4f} nats/token"
    )


def exact_hint(held: TextDiffusion, estimates: Estimates, processes: int) -> Iterator[str]:
    """Say so where enumeration takes no more network rows than the estimate has taken.

    Args:
        held: the model.
        estimates: the result.
        processes: how many shared the work.
    """
    size = held.family.block_size
    if size is None or estimates.exact or estimates.estimator != default_estimator(held.family):
        return
    rows, windows = 2**size - 1, estimates.windows
    if rows * len(windows.tokens) > estimates.rows * processes:
        return
    try:
        build_estimator("exact").check(held.model, held.family, windows)
    except ConfigError:
        return
    yield (
        f"blocks of {size}: --estimator exact has no Monte-Carlo error, at {rows} network row(s) "
        f"per window instead of {estimates.rows * processes / len(windows.tokens):.0f}"
    )


def difference_lines(difference: Difference, first: str, second: str) -> Iterator[str]:
    """Yield the lines of `textdiff compare`: the difference, its two errors and the verdict.

    Args:
        difference: the first model's bound minus the second's.
        first: the first model, as the user named it.
        second: the second.
    """
    error = "" if difference.doubt else f" ± {difference.stderr:.5f}"
    yield (
        f"{first} minus {second}: {difference.mean:+.5f}{error} {difference.unit} "
        f"({difference.replicates} paired replicates, {difference.tokens:,} tokens)"
    )
    if difference.left_out:
        yield (
            f"{difference.left_out} of {difference.left_out + difference.documents} documents are "
            "left out: the tokens of one of the models do not give their text back, so bits per "
            "byte do not compare there"
        )
    if difference.text_stderr is not None:
        error = f"{difference.text_stderr:.5f} {difference.unit}"
        yield f"standard error over {difference.documents} documents: {error}"
    yield verdict(difference, first, second)


def verdict(difference: Difference, first: str, second: str) -> str:
    """Return which model the text prefers, and how sure that is."""
    low, high = difference.interval()
    if difference.mean == 0.0 and difference.stderr == 0.0:
        return "Their bounds are the same."
    if difference.doubt:
        return f"On this text neither is shown to be better: {difference.doubt}."
    better, worse = (first, second) if difference.mean < 0 else (second, first)
    if low <= 0.0 <= high:
        return (
            "On this text neither is shown to be better: the 95 % interval of the Monte-Carlo "
            f"error, {low:+.5f} to {high:+.5f}, holds 0. More replicates narrow it."
        )
    sure = f"On this text {better} has a lower bound than {worse} (95 % interval {low:+.5f} to "
    sure += f"{high:+.5f})"
    if difference.text_stderr is None:
        return f"{sure}; one document says nothing about others."
    if abs(difference.mean) > 1.96 * difference.text_stderr:
        return f"{sure}, and by more than documents of this kind differ: it should hold for others."
    return f"{sure}, but documents differ by more than that: on others it may be the other way."
