"""Stated errors against enumeration: intervals cover the truth as often as they say."""

import math

import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table

from textdiff.likelihood import Estimates, Windows, cut_windows, estimate
from textdiff.likelihood.estimate import FEW_TOKENS_REPLICATES, MIN_REPLICATES, _planned
from textdiff.likelihood.estimators import ESTIMATORS

REPETITIONS = 1000


@pytest.fixture(scope="module")
def table():
    return random_table(0)


def texts(windows: int) -> torch.Tensor:
    return all_sequences()[:: 27 // windows][:windows]


def repetitions(count: int, windows: int = 9) -> Windows:
    """One document of several windows, over and over: every copy has noise of its own."""
    document = texts(windows).flatten().to(torch.int32).numpy()
    clean = family().process.vocabulary.clean
    return cut_windows([document] * count, ["a" * len(document)] * count, LENGTH, clean)


def truth(table, windows: int = 9) -> float:
    return sum(table.nelbo(x) for x in texts(windows)) / (LENGTH * windows)


@pytest.mark.parametrize(
    ("name", "options"),
    [("masked_count", {}), ("balanced", {"samples": 2}), ("any_order", {})],
    ids=str,
)
def test_intervals_of_a_fixed_number_of_replicates(table, name, options):
    found = estimate(
        TableDenoiser(table), family(), repetitions(REPETITIONS), estimator=name, seed=4, **options
    )
    assert ESTIMATORS[name].caveat == ""
    assert 0.93 <= coverage(found, truth(table)) <= 0.97


def coverage(found: Estimates, exact: float) -> float:
    """The share of documents whose 95 % interval holds what they all cost."""
    intervals = [found.document(index).interval(0.95) for index in range(REPETITIONS)]
    return sum(low <= exact <= high for low, high in intervals) / REPETITIONS


def test_texts_of_a_few_tokens_get_more_replicates():
    """One window of three tokens: the mean of 8 replicates is no more normal than its masks."""
    worst, x = random_table(2), all_sequences()[5]
    array, clean = x.to(torch.int32).numpy(), family().process.vocabulary.clean
    one = cut_windows([array], ["abc"], LENGTH, clean)
    many = cut_windows([array] * REPETITIONS, ["abc"] * REPETITIONS, LENGTH, clean)
    denoiser = TableDenoiser(worst)
    assert len(estimate(denoiser, family(), one, seed=4).nats) == FEW_TOKENS_REPLICATES
    assert len(estimate(denoiser, family(), one, estimator="exact", seed=4).nats) == 1
    found = estimate(denoiser, family(), many, seed=4, replicates=FEW_TOKENS_REPLICATES)
    exact = worst.nelbo(x) / LENGTH
    assert 0.93 <= coverage(found, exact) <= 0.97
    fewer = Estimates({"diffusion": found.nats[:MIN_REPLICATES]}, many)
    assert coverage(fewer, exact) < 0.93  # why there are more


def test_random_times_state_too_small_an_error_and_say_so(table):
    found = estimate(
        TableDenoiser(table), family(), repetitions(REPETITIONS), estimator="time", seed=4
    )
    assert "88 to 90 %" in ESTIMATORS["time"].caveat
    assert 0.86 <= coverage(found, truth(table)) <= 0.92


@pytest.mark.slow
def test_intervals_of_a_wanted_precision(table):
    """Stein's rule keeps its promise; stopping when the interval looks narrow would not."""
    most, precision, size = 100, 0.3, 4
    found = estimate(
        TableDenoiser(table),
        family(),
        repetitions(REPETITIONS, size),
        seed=9,
        replicates=most,
        samples=1,  # as much spread as there can be: most runs must go on past the pilot
    )
    one, exact = repetitions(1, size), truth(table, size)
    covered, used, widths = 0, [], []
    for index in range(REPETITIONS):
        nats = found.nats[:, index : index + 1]
        first = list(nats[:MIN_REPLICATES].unsqueeze(1))
        planned = _planned(first, one, precision, MIN_REPLICATES)
        kept = nats[: min(planned, most)]
        pilot = MIN_REPLICATES if planned > MIN_REPLICATES else None
        low, high = Estimates({"diffusion": kept}, one, pilot=pilot).bound().interval(0.95)
        covered += low <= exact <= high
        used.append(planned)
        widths.append((high - low) / 2)
    assert 0.93 <= covered / REPETITIONS <= 0.97
    wanted = math.log1p(precision) * (1 + 1e-9)
    within = [w <= wanted for w, n in zip(widths, used, strict=True) if n <= most]
    assert all(within)
    assert len(within) > 0.97 * REPETITIONS
    assert sum(used) / REPETITIONS > 2 * MIN_REPLICATES
