"""Stated errors against enumeration: intervals cover the truth as often as they say."""

import math
from functools import lru_cache

import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table
from test_exact_estimators import finite_value, importance_value

from textdiff.likelihood.bound import student_t_quantile
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.estimators import ESTIMATORS, build_estimator
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.stopping import (
    LEAST_DRAWS,
    LEAST_PILOT,
    MIN_REPLICATES,
    least_replicates,
    replicates_for,
)
from textdiff.likelihood.windows import Windows, cut_windows

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


@pytest.mark.parametrize("windows", [3, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("masked_count", {}),
        ("balanced", {"samples": 2}),
        ("any_order", {}),
        ("importance", {"orders": 2}),
        ("finite_t", {"timesteps": 6}),
        ("finite_t", {"timesteps": 200}),
    ],
    ids=str,
)
def test_intervals_of_a_fixed_number_of_replicates(table, name, options, windows):
    one = least_replicates(
        repetitions(1, windows), family(), build_estimator(name, **options).draws
    )
    found = estimate(
        TableDenoiser(table),
        family(),
        repetitions(REPETITIONS, windows),
        estimator=name,
        seed=5,
        replicates=one,
        **options,
    )
    exact = sum(expected(name, options, table, x) for x in texts(windows)) / (LENGTH * windows)
    assert ESTIMATORS[name].caveat == ""
    assert 0.93 <= coverage(found, exact) <= 0.97


def coverage(found: Estimates, exact: float) -> float:
    """The share of documents whose 95 % interval holds what they all cost."""
    intervals = [found.document(index).interval(0.95) for index in range(REPETITIONS)]
    return sum(low <= exact <= high for low, high in intervals) / REPETITIONS


def plain_coverage(nats: torch.Tensor, exact: float) -> float:
    """The share of columns of [R, N] nats whose uncorrected Student interval holds the truth."""
    width = QUANTILES(len(nats) - 1) * nats.std(0) / math.sqrt(len(nats)) / LENGTH
    return float(((nats.mean(0) / LENGTH - exact).abs() <= width).double().mean())


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
    assert plain_coverage(found.nats[:MIN_REPLICATES], exact) < 0.93  # why there are more


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


def test_documents_of_their_own_draw_noise_as_often_as_one_alone(table):
    """A text of many documents needs few replicates; each of its documents needs more."""
    array, clean = texts(3).flatten().to(torch.int32).numpy(), family().process.vocabulary.clean
    empty = array[:0]
    windows = cut_windows([array, array[:3], empty] * 9, ["abc"] * 27, LENGTH, clean)
    problem = TableDenoiser(table), family(), windows
    assert len(estimate(*problem, seed=4).nats) == MIN_REPLICATES
    found = estimate(*problem, seed=4, each_document=True)
    assert found.replicates == found.least == 32
    assert len(estimate(*problem, seed=4, each_document=True, samples=1).nats) == LEAST_DRAWS


def test_random_times_state_too_small_an_error_and_say_so(table):
    found = estimate(
        TableDenoiser(table), family(), repetitions(REPETITIONS), estimator="time", seed=4
    )
    assert ESTIMATORS["time"].caveat
    bounds, exact = [found.document(index) for index in range(REPETITIONS)], truth(table)
    given = [bound.interval() for bound in bounds if bound.is_reliable]
    held = sum(low <= exact <= high for low, high in given)
    assert 0.9 <= len(given) / REPETITIONS < 0.97  # a draw that weighs much is seen, if it is there
    assert 0.9 <= held / len(given) <= 0.95
    plain = [b.mean - exact for b in bounds]
    widths = [QUANTILES(found.replicates - 1) * b.stderr for b in bounds]
    uncorrected = sum(abs(x) <= width for x, width in zip(plain, widths, strict=True))
    assert 0.86 <= uncorrected / REPETITIONS <= 0.92


STOPPED = [
    (1, 2, "masked_count", {"samples": 1}),  # table 2: skewed costs
    (2, 0, "masked_count", {"samples": 1}),
    (3, 0, "masked_count", {}),
    (9, 0, "any_order", {}),
    (1, 2, "balanced", {"samples": 2}),
    (3, 0, "balanced", {}),
    (1, 2, "importance", {"orders": 2}),
    (3, 0, "finite_t", {"timesteps": 6}),
    (1, 2, "finite_t", {"timesteps": 200}),
]


@pytest.mark.parametrize("ratio", [1.0, pytest.param(5.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("windows", "seed", "name", "options"), STOPPED, ids=str)
def test_intervals_of_a_wanted_precision(windows, seed, name, options, ratio):
    """Coverage and mean where costs are skewed, and never a wider interval than wanted.

    Runs draw from 20,000 of the library's replicates of one text, as many as its rule asks for:
    about `ratio` times the smallest number.
    """
    table = random_table(seed)
    x = all_sequences()[5][None] if windows == 1 else texts(windows)
    document, size = x.flatten().to(torch.int32).numpy(), LENGTH * windows
    chosen = family()

    def cut(copies: int) -> Windows:
        clean = chosen.process.vocabulary.clean
        return cut_windows([document] * copies, ["a" * size] * copies, LENGTH, clean)

    problem = TableDenoiser(table), chosen, cut(1000)
    settings = {"estimator": name, "seed": 9, "replicates": 20, "batch_tokens": 2**16}
    pool = estimate(*problem, **settings, **options).nats.flatten()
    exact = sum(expected(name, options, table, row) for row in x)
    first = least_replicates(cut(1), chosen, build_estimator(name, **options).draws)
    precision = math.expm1(1.96 * float(pool.std()) / size / math.sqrt(ratio * first))
    draw, one = torch.Generator().manual_seed(1), cut(1)

    def drawn(count: int) -> torch.Tensor:
        return pool[torch.randint(len(pool), (count,), generator=draw)]

    repetitions, planned = 2000, max(first, LEAST_PILOT)
    pilots = drawn(repetitions * planned).view(repetitions, planned)
    used = [max(first, replicates_for(precision, pilot / size)) for pilot in pilots]
    runs = drawn(sum(used)).split(used)
    means = torch.stack([run.mean() for run in runs])  # [repetitions], as their errors
    root = torch.tensor(used, dtype=torch.float64).sqrt()
    stderrs = pilots.std(1) / root
    for run, pilot, mean, stderr in zip(runs[:50], pilots, means, stderrs, strict=False):
        found = Estimates({"diffusion": run[:, None]}, one, pilot=pilot).bound()
        stated = found.mean * size, found.stderr * size, found.pilot
        assert stated == pytest.approx((float(mean), float(stderr), planned), rel=1e-12)
    half = QUANTILES(planned - 1) * stderrs
    assert (half / size <= math.log1p(precision) * (1.0 + 1e-12)).all()
    assert 0.93 <= float(((means - exact).abs() <= half).double().mean()) <= 0.97
    errors = (means - exact) / pool.std() * root
    bias = 4 * math.sqrt(1.0 / repetitions + max(used) / len(pool))
    assert abs(float(errors.mean())) < bias  # in standard errors
    assert sum(used) / repetitions > ratio * first


def expected(name: str, options: dict, table, x: torch.Tensor) -> float:
    """What an estimator's mean is for one window, by enumeration."""
    if name == "importance":
        return importance_value(table, x, options["orders"])
    if name == "finite_t":
        return finite_value(table, x, options["timesteps"])
    return table.nelbo(x)


def test_replicates_of_a_precision_are_those_of_their_number(table):
    """The pilot says how many and nothing else: it has draws of its own and is in no figure."""
    problem = TableDenoiser(table), family(), repetitions(3)
    shares = []

    def watched(share):
        shares.append(float(share.sum()) / 2)  # by document and once more by token
        return share

    found = estimate(*problem, seed=3, precision=0.02, attribute=True, reduce=watched)
    pilot = len(found.pilot)
    assert found.pilot.tolist() == pytest.approx(shares[:pilot])
    assert not set(shares[:pilot]) & set(shares[pilot:])
    assert found.replicates > pilot == LEAST_PILOT
    fixed = estimate(*problem, seed=3, replicates=found.replicates, attribute=True)
    assert torch.equal(found.nats, fixed.nats)
    assert torch.equal(torch.cat(found.token_nats()), torch.cat(fixed.token_nats()))
    assert found.bound().mean == fixed.bound().mean
    assert found.rows == fixed.rows + fixed.rows * pilot // found.replicates
