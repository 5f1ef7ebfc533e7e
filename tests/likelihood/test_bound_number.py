"""The number itself: quantiles, intervals, units and both standard errors by hand."""

import json
import math

import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table

from textdiff.likelihood.bound import Bound, student_t_quantile
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.stopping import (
    LEAST_PILOT,
    MAX_REPLICATES,
    MIN_REPLICATES,
    replicates_for,
)
from textdiff.likelihood.windows import Windows, cut_windows

# Published tables, to all printed digits.
T_TABLE = {
    (0.975, 1): 12.70620474,
    (0.975, 2): 4.30265273,
    (0.975, 3): 3.18244631,
    (0.95, 5): 2.01504837,
    (0.975, 7): 2.36462425,
    (0.975, 8): 2.30600414,
    (0.995, 9): 3.24983554,
    (0.9, 10): 1.37218364,
    (0.975, 30): 2.04227246,
    (0.975, 100): 1.98397152,
    (0.9995, 4): 8.61030158,
}


@pytest.mark.parametrize(("probability", "degrees"), T_TABLE)
def test_student_t_quantiles_are_the_tabulated_ones(probability, degrees):
    exact = T_TABLE[probability, degrees]
    assert student_t_quantile(probability, degrees) == pytest.approx(exact, abs=1e-8)
    assert student_t_quantile(1.0 - probability, degrees) == pytest.approx(-exact, abs=1e-7)
    assert student_t_quantile(0.5, degrees) == 0.0


def test_one_degree_is_cauchy_and_many_are_normal():
    for probability in (0.6, 0.9, 0.999):
        cauchy = math.tan(math.pi * (probability - 0.5))
        assert student_t_quantile(probability, 1) == pytest.approx(cauchy, rel=1e-9)
        normal = float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
        assert student_t_quantile(probability, 4000) == pytest.approx(normal, rel=2e-3)


def bound(**changes) -> Bound:
    values = {
        "mean": 1.5,
        "stderr": 0.1,
        "text_stderr": None,
        "tokens": 20,
        "bytes": 60,
        "documents": 1,
        "estimator": "masked_count",
        "replicates": 8,
        "terms": {"diffusion": 1.5},
    }
    return Bound(**(values | changes))


def test_interval_is_student_t_with_one_degree_less_than_replicates():
    low, high = bound().interval(0.95)
    assert high - 1.5 == pytest.approx(0.236462425, abs=1e-8)
    assert 1.5 - low == pytest.approx(0.236462425, abs=1e-8)
    low, high = bound(replicates=10).interval(0.99)
    assert high - low == pytest.approx(2 * 0.324983554, abs=1e-8)
    low, high = bound(replicates=50, pilot=8).interval(0.95)  # whose spread the error is of
    assert high - low == pytest.approx(2 * 0.236462425, abs=1e-8)
    assert bound().perplexity_interval() == pytest.approx(tuple(map(math.exp, bound().interval())))


def test_units():
    assert bound().perplexity == pytest.approx(math.exp(1.5))
    assert bound().bits_per_token == pytest.approx(1.5 / math.log(2.0))
    assert bound().bits_per_byte == pytest.approx(1.5 * 20 / 60 / math.log(2.0))
    data = bound().to_dict()
    assert data["bits_per_byte"] == bound().bits_per_byte
    assert data["interval_95"] == list(bound().interval())


def test_a_perplexity_beyond_floats_is_infinite_and_null_in_json():
    huge = bound(mean=720.0, stderr=10.0)
    assert huge.perplexity == math.inf
    low, high = huge.perplexity_interval()
    assert low == pytest.approx(math.exp(huge.interval()[0]))
    assert high == math.inf
    data = huge.to_dict()
    assert data["perplexity"] is None
    assert data["perplexity_interval_95"] == [low, None]
    json.dumps(data, allow_nan=False)  # raises for what is no JSON


def estimates(nats: list[list[float]], tokens: list[int]) -> Estimates:
    count = len(tokens)
    windows = Windows(
        [], torch.arange(count), torch.zeros(count), torch.tensor(tokens), torch.tensor(tokens) * 3
    )
    return Estimates({"diffusion": torch.tensor(nats, dtype=torch.float64)}, windows)


def test_both_errors_of_a_hand_example():
    """Documents of 2 and 6 tokens; replicate totals 10, 12, 14 over 8 tokens.

    Monte Carlo: per token 1.25, 1.5, 1.75, sd 0.25, over sqrt 3. Text: means 4 and 8, ratio 1.5,
    residuals 4 - 3 and 8 - 9, so sqrt(2 / (2 - 1) * (1 + 1)) / 8 = 0.25.
    """
    result = estimates([[3.0, 7.0], [4.0, 8.0], [5.0, 9.0]], [2, 6]).bound()
    assert result.mean == pytest.approx(1.5, abs=1e-15)
    assert result.stderr == pytest.approx(0.25 / math.sqrt(3.0), abs=1e-15)
    assert result.text_stderr == pytest.approx(0.25, abs=1e-15)
    assert (result.tokens, result.bytes, result.documents, result.replicates) == (8, 24, 2, 3)
    assert sum(result.terms.values()) == pytest.approx(result.mean, abs=1e-15)


def test_documents_of_one_rate_have_no_text_error():
    result = estimates([[2.0, 6.0], [2.0, 6.0]], [2, 6]).bound()
    assert result.stderr == 0.0
    assert result.text_stderr == pytest.approx(0.0, abs=1e-15)


def test_one_document_has_no_text_error_at_all():
    several = estimates([[3.0, 7.0], [4.0, 8.0], [5.0, 9.0]], [2, 6])
    first = several.document(0)
    assert first.text_stderr is None
    assert first.mean == pytest.approx(2.0, abs=1e-15)
    assert first.stderr == pytest.approx(0.5 / math.sqrt(3.0), abs=1e-15)
    assert (first.tokens, first.bytes, first.documents) == (2, 6, 1)


def test_text_error_is_the_spread_of_the_ratio_over_documents():
    """Against the spread over many resampled corpora of documents of random length."""
    generator = torch.Generator().manual_seed(0)
    corpora, documents = 400, 200
    ratios, stated = [], []
    for _ in range(corpora):
        tokens = torch.randint(1, 40, (documents,), generator=generator)
        rate = 1.0 + 0.3 * torch.randn(documents, generator=generator, dtype=torch.float64)
        result = estimates([(rate * tokens).tolist()] * 2, tokens.tolist()).bound()
        ratios.append(result.mean)
        stated.append(result.text_stderr)
    spread = float(torch.tensor(ratios).double().std())
    assert sum(stated) / corpora == pytest.approx(spread, rel=0.12)


# --- precision -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem():
    table = random_table(0)
    documents = [x.to(torch.int32).numpy() for x in all_sequences()[:6]]
    clean = family().process.vocabulary.clean
    return TableDenoiser(table), family(), cut_windows(documents, ["abc"] * 6, LENGTH, clean)


def test_a_precision_takes_the_replicates_that_reach_it(problem):
    first = estimate(*problem, seed=1)
    assert len(first.nats) == MIN_REPLICATES
    for precision in (0.2, 0.05):
        more = estimate(*problem, seed=1, precision=precision)
        assert len(more.nats) > MIN_REPLICATES
        assert torch.equal(more.nats[:MIN_REPLICATES], first.nats)  # the same draws, and then more
        result = more.bound()
        low, high = result.perplexity_interval()
        assert high / result.perplexity - 1.0 <= precision * (1 + 1e-9)
        assert 1.0 - low / result.perplexity <= precision * (1 + 1e-9)
        assert result.replicates == len(more.nats)
        assert result.pilot == len(more.pilot) == LEAST_PILOT
        spread = float((more.pilot / 18).std())
        assert result.stderr == pytest.approx(spread / math.sqrt(result.replicates), rel=1e-12)
        assert more.document(0).pilot == 0
        own = (more.nats[:, 0] / LENGTH).std() / math.sqrt(result.replicates)
        assert more.document(0).stderr == pytest.approx(float(own), rel=1e-12)


def test_a_precision_already_reached_adds_nothing(problem):
    assert len(estimate(*problem, seed=1, precision=50.0).nats) == MIN_REPLICATES


def test_a_precision_costs_as_its_square(problem):
    """Four times the replicates for half the width: of one seed the pilot is the same."""
    reached = len(estimate(*problem, seed=1, precision=math.expm1(0.05)).nats)
    half = len(estimate(*problem, seed=1, precision=math.expm1(0.1)).nats)
    assert half > MIN_REPLICATES
    assert reached / half == pytest.approx(4.0, abs=4.0 / half)


def test_replicates_for_a_precision_by_hand():
    """Spread 0.3 in 11 replicates: 10 degrees, whose t is 2.22814, so (2.22814 * 0.3 / width)^2."""
    pilot = torch.linspace(-1.0, 1.0, 11, dtype=torch.float64)
    pilot = 2.0 + 0.3 * pilot / pilot.std()
    assert replicates_for(math.expm1(0.1), pilot) == 45  # 44.68
    assert replicates_for(1e-6, pilot) == MAX_REPLICATES
    assert replicates_for(0.1, torch.full((8,), 2.0, dtype=torch.float64)) == 0


def test_fewer_replicates_than_eight_are_raised_to_eight(problem):
    assert len(estimate(*problem, seed=1, replicates=2).nats) == MIN_REPLICATES


def test_progress_counts_every_window_once(problem):
    told = []
    estimate(
        *problem, seed=1, batch_tokens=6, progress=lambda done, total: told.append((done, total))
    )
    assert [done for done, _ in told] == list(range(2, 6 * 8 + 1, 2))
    assert {total for _, total in told} == {6 * 8}
