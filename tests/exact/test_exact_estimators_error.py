"""Stated errors against enumeration: intervals cover the truth as often as they say."""

import math
from functools import lru_cache

import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table

from textdiff.likelihood import Estimates, Windows, cut_windows, estimate
from textdiff.likelihood.bound import student_t_quantile
from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.stopping import (
    LEAST_DRAWS,
    MIN_REPLICATES,
    PILOT_SHARE,
    least_replicates,
    replicates_for,
)

REPETITIONS = 1000
QUANTILES = lru_cache(None)(lambda degrees: student_t_quantile(0.975, degrees))


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


@pytest.mark.parametrize(("samples", "text"), [(1, 19), (2, 5)])
def test_texts_of_few_draws_get_more_replicates(samples, text):
    """One window of three tokens: the mean of 8 replicates is no more normal than its masks."""
    worst, x = random_table(2), all_sequences()[text]
    array, clean = x.to(torch.int32).numpy(), family().process.vocabulary.clean
    one = cut_windows([array], ["abc"], LENGTH, clean)
    many = cut_windows([array] * REPETITIONS, ["abc"] * REPETITIONS, LENGTH, clean)
    denoiser, most = TableDenoiser(worst), LEAST_DRAWS // samples
    assert len(estimate(denoiser, family(), one, seed=4, samples=samples).nats) == most
    assert len(estimate(denoiser, family(), one, estimator="exact", seed=4).nats) == 1
    found = estimate(denoiser, family(), many, seed=4, replicates=most, samples=samples)
    exact = worst.nelbo(x) / LENGTH
    assert 0.93 <= coverage(found, exact) <= 0.97
    fewer = Estimates({"diffusion": found.nats[:MIN_REPLICATES]}, many)
    assert coverage(fewer, exact) < 0.93  # why there are more


def test_draws_are_counted_over_windows_and_their_scored_blocks():
    array, clean = texts(3).flatten().to(torch.int32).numpy(), family().process.vocabulary.clean

    def least(draws: int, block_size: int | None = None, **options) -> int:
        windows = cut_windows([array], ["a" * 9], LENGTH, clean, **options)
        return least_replicates(windows, family(block_size), draws)

    assert least(1) == 22  # three windows
    assert least(2) == 11
    assert least(2, 2) == MIN_REPLICATES  # six blocks
    assert least(1, 2) == 11
    last = (torch.arange(9) == 8).numpy()
    assert least(1, 2, scored=[last]) == 64  # one block with a token to score


def test_random_times_state_too_small_an_error_and_say_so(table):
    found = estimate(
        TableDenoiser(table), family(), repetitions(REPETITIONS), estimator="time", seed=4
    )
    assert "88 to 90 %" in ESTIMATORS["time"].caveat
    assert 0.86 <= coverage(found, truth(table)) <= 0.92


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize("precision", [0.4, 0.2])
def test_a_wanted_precision_keeps_the_law_of_its_replicates(windows, precision):
    """Coverage and mean where costs are skewed, and mostly as narrow an interval as wanted.

    Runs draw from 60,000 of the library's replicates of one text; as many as its rule asks for.
    """
    table = random_table(2 if windows == 1 else 0)
    x = all_sequences()[5][None] if windows == 1 else texts(2)
    document = x.flatten().to(torch.int32).numpy()
    chosen, size = family(), LENGTH * windows
    copies = cut_windows(
        [document] * 1000, ["a" * size] * 1000, LENGTH, chosen.process.vocabulary.clean
    )
    pool = (
        estimate(
            TableDenoiser(table),
            chosen,
            copies,
            seed=9,
            replicates=60,
            samples=1,
            batch_tokens=2**16,
        ).nats.flatten()
        / size
    )
    exact = sum(table.nelbo(row) for row in x) / size
    deviation = pool - pool.mean()
    assert float(deviation.pow(3).mean() / pool.std() ** 3) > 0.7
    first, repetitions = LEAST_DRAWS // windows, 2000
    draw = torch.Generator().manual_seed(1)

    def drawn(count: int) -> torch.Tensor:
        return pool[torch.randint(len(pool), (count,), generator=draw)]

    covered, within, errors, used = 0, 0, [], []
    for _ in range(repetitions):
        pilot = drawn(first)
        while len(pilot) < (least := replicates_for(precision, pilot) // PILOT_SHARE):
            pilot = torch.cat([pilot, drawn(least - len(pilot))])
        count = max(first, replicates_for(precision, pilot))
        values = drawn(count)
        half = QUANTILES(count - 1) * float(values.std()) / math.sqrt(count)
        covered += abs(float(values.mean()) - exact) <= half
        within += half <= math.log1p(precision)
        errors.append(float(values.mean() - pool.mean()) / float(pool.std()) * math.sqrt(count))
        used.append(count)
    assert 0.93 <= covered / repetitions <= 0.97
    assert within > 0.8 * repetitions
    assert abs(sum(errors) / repetitions) < 4 / math.sqrt(repetitions)  # in standard errors
    assert precision == 0.4 or sum(used) / repetitions > 1.5 * first


def test_replicates_of_a_precision_are_those_of_their_number(table):
    """The pilot says how many and nothing else: it has draws of its own and is in no figure."""
    problem = TableDenoiser(table), family(), repetitions(3)
    shares = []

    def watched(share):
        shares.append(float(share.sum()))
        return share

    found = estimate(*problem, seed=3, precision=0.02, attribute=True, reduce=watched)
    assert not set(shares[: found.pilot]) & set(shares[found.pilot :])
    assert found.replicates > found.pilot >= MIN_REPLICATES
    fixed = estimate(*problem, seed=3, replicates=found.replicates, attribute=True)
    assert torch.equal(found.nats, fixed.nats)
    assert torch.equal(torch.cat(found.token_nats()), torch.cat(fixed.token_nats()))
    assert found.bound().interval() == fixed.bound().interval()
    assert found.rows == fixed.rows + fixed.rows * found.pilot // found.replicates
