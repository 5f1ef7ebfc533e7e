"""Identities 3, 5 and 32: times, counts and orders are one bound, steps a looser one.

Networks may see the noise level.
"""

import itertools
import math
from statistics import fmean

import pytest
import torch
from exact_stats import beta_cdf, chi_square_p, gauss_legendre, ks_statistic
from exact_tables import (
    LENGTH,
    MASK,
    TableDenoiser,
    all_sequences,
    code,
    family,
    oracle,
    random_joint,
    random_table,
    subsets,
)
from noise_calls import noise_by_count, noise_by_step, noise_by_time
from torch import Tensor

from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.loss import PositionTerms, corrupt

TEXTS = all_sequences()[::5]
NODES = 40


def row_nats(denoiser, family, x0, noise) -> Tensor:
    batch = corrupt(family, x0, noise, None)
    terms = PositionTerms(denoiser, family, batch).all()
    return torch.zeros(len(x0), dtype=torch.float64).index_add(
        0, batch.positions // x0.shape[1], terms
    )


def time_nodes() -> tuple[Tensor, Tensor]:
    """Nodes and weights for t = s ** 2, which makes fractional powers of t smooth at 0."""
    s, weight = gauss_legendre(NODES)
    return s**2, weight * 2.0 * s


def time_integral(denoiser, family, x: Tensor) -> float:
    """The expectation over independent hits, integrated over t by quadrature."""
    t, weight = time_nodes()
    total = 0.0
    for subset in [(), *subsets()]:
        u = torch.ones(NODES, LENGTH, dtype=torch.float64)  # one is never, zero is always hit
        u[:, list(subset)] = 0.0
        noise = noise_by_time(family.schedule, NoiseUniforms(t[:, None], u), family.blocks(LENGTH))
        rate = noise.threshold[:, 0]
        chance = rate ** len(subset) * (1.0 - rate) ** (LENGTH - len(subset))
        assert noise.corrupted.sum(1).eq(len(subset)).all()
        found = row_nats(denoiser, family, x.expand(NODES, -1), noise)
        total += float((weight * chance * found).sum())
    return total


IDEAL = [
    {"kind": "loglinear"},
    {"kind": "cosine"},
    {"kind": "polynomial", "exponent": 2.0},
    {"kind": "polynomial", "exponent": 1.5},
    {"kind": "polynomial", "exponent": 0.5},
]


@pytest.mark.parametrize("schedule", IDEAL, ids=lambda s: "-".join(map(str, s.values())))
def test_every_schedule_integrates_to_the_mean_over_orders(schedule):
    table = random_table(0)
    denoiser = TableDenoiser(table)
    polynomial = schedule["kind"] == "loglinear"  # in t: the quadrature is exact
    tolerance = 1e-12 if polynomial else 1e-8
    for x in TEXTS:
        chains = [table.chain(x, order) for order in itertools.permutations(range(LENGTH))]
        value = time_integral(denoiser, family(schedule=schedule), x)
        assert value == pytest.approx(fmean(chains), abs=tolerance)
        assert value == pytest.approx(table.nelbo(x), abs=tolerance)


@pytest.mark.parametrize(
    "schedule",
    [{"kind": "loglinear", "eps": 0.1}, {"kind": "geometric", "sigma_min": 0.05, "sigma_max": 3.0}],
    ids=lambda s: s["kind"],
)
def test_schedules_without_ideal_ends_cover_only_their_own_rates(schedule):
    """Identity 3's second half: the integral is the incomplete-Beta sum over the rates covered."""
    table = random_table(0)
    chosen = family(schedule=schedule)
    ends = 1.0 - chosen.schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    for x in TEXTS:
        exact = 0.0
        for subset in subsets():
            k = len(subset)
            low, high = beta_cdf(ends, k, LENGTH)
            share = float(high - low) / (k * math.comb(LENGTH, k))
            exact += share * table.cross_entropy(x, subset)
        value = time_integral(TableDenoiser(table), chosen, x)
        assert value == pytest.approx(exact, abs=1e-8)


# --- identity 5 ----------------------------------------------------------------------------------


def step_expectation(denoiser, family, x: Tensor, steps: int) -> float:
    """The expectation over the steps of the library's noise and over independent hits."""
    v = ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps)[:, None]
    total = 0.0
    for subset in [(), *subsets()]:
        u = torch.ones(steps, LENGTH, dtype=torch.float64)
        u[:, list(subset)] = 0.0
        noise = noise_by_step(family.schedule, steps, NoiseUniforms(v, u), family.blocks(LENGTH))
        assert noise.corrupted.sum(1).eq(len(subset)).all()
        rate = noise.threshold[:, 0]
        chance = rate ** len(subset) * (1.0 - rate) ** (LENGTH - len(subset))
        found = row_nats(denoiser, family, x.expand(steps, -1), noise)
        total += float((chance * found).mean())
    return total


@pytest.mark.parametrize("schedule", IDEAL, ids=lambda s: "-".join(map(str, s.values())))
def test_one_step_is_the_product_of_what_is_said_about_masks_alone(schedule):
    table = random_table(0)
    blank = int(code(torch.full((LENGTH,), MASK)))
    for x in TEXTS:
        exact = -sum(float(table.log_p[blank, i, x[i]]) for i in range(LENGTH))
        value = step_expectation(TableDenoiser(table), family(schedule=schedule), x, 1)
        assert value == pytest.approx(exact, abs=1e-12)


def test_gap_of_the_oracle_is_positive_and_halves_as_steps_double():
    joint = random_joint(3)
    denoiser = TableDenoiser(oracle(joint))
    gaps = [
        sum(
            float(p) * (step_expectation(denoiser, family(), x, steps) + math.log(p))
            for x, p in zip(all_sequences(), joint, strict=True)
        )
        for steps in (4, 8, 16, 32)
    ]
    assert all(gap > 0.0 for gap in gaps)
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(gaps)]
    assert all(1.6 < ratio < 2.05 for ratio in ratios)
    assert ratios == sorted(ratios)


# --- identity 32 ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def time_conditioned():
    """A denoiser whose conditionals move with the noise level."""
    return TableDenoiser(random_table(0), drift=2.0 * random_table(9).log_p.clamp(min=-3.0))


def count_expectation(denoiser, family, x: Tensor) -> float:
    """E over k ~ U{1..L}, lambda | k ~ Beta(k, L - k + 1) and subsets, by quadrature in lambda."""
    rates, weight = time_nodes()
    total = 0.0
    for subset in subsets():
        k, n = len(subset), LENGTH
        density = k * math.comb(n, k) * rates ** (k - 1) * (1.0 - rates) ** (n - k)
        # The largest uniform of the subset is lambda, the others of it lie below, the rest above.
        u = (0.5 + 0.5 * rates)[:, None].repeat(1, n)
        u[:, list(subset)] = 0.5 * rates[:, None]
        u[:, subset[-1]] = rates
        v = torch.full((NODES, 1), (k - 0.5) / n, dtype=torch.float64)
        noise = noise_by_count(NoiseUniforms(v, u), family.blocks(n))
        assert noise.corrupted.sum(1).eq(k).all()
        assert torch.equal(1.0 - noise.alpha[:, 0], 1.0 - (1.0 - rates))
        found = row_nats(denoiser, family, x.expand(NODES, -1), noise)
        total += float((weight * density * found).sum()) / (n * math.comb(n, k))
    return total


def test_counts_with_beta_rates_are_the_time_integral(time_conditioned):
    for x in TEXTS:
        exact = time_integral(time_conditioned, family(), x)
        assert count_expectation(time_conditioned, family(), x) == pytest.approx(exact, abs=1e-9)


def test_that_integral_does_depend_on_the_noise_level(time_conditioned):
    """Else the test above would be identity 2 again."""
    table = random_table(0)
    gaps = [time_integral(time_conditioned, family(), x) - table.nelbo(x) for x in TEXTS]
    assert max(map(abs, gaps)) > 0.05


def test_drawn_counts_and_rates_are_unbiased_for_a_network_that_sees_them(time_conditioned):
    x = TEXTS[3]
    rows = 40_000
    key = torch.arange(rows)[:, None]
    v = uniforms(5, Stream.JITTER, row=key)
    u = uniforms(5, Stream.POSITION, row=key, position=torch.arange(LENGTH))
    noise = noise_by_count(NoiseUniforms(v, u), family().blocks(LENGTH))
    found = row_nats(time_conditioned, family(), x.expand(rows, -1), noise)
    error = float(found.std()) / math.sqrt(rows)
    assert abs(float(found.mean()) - time_integral(time_conditioned, family(), x)) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("length", [3, 8])
def test_the_rate_given_the_count_is_beta_and_independent_of_the_subset(length):
    rows = 60_000
    key = torch.arange(rows)[:, None]
    v = uniforms(8, Stream.JITTER, row=key)
    u = uniforms(8, Stream.POSITION, row=key, position=torch.arange(length))
    noise = noise_by_count(NoiseUniforms(v, u), family().blocks(length))
    counts, rate = noise.corrupted.sum(1), 1.0 - noise.alpha[:, 0]
    assert (
        chi_square_p(
            torch.bincount(counts, minlength=length + 1)[1:].double(),
            torch.full((length,), rows / length, dtype=torch.float64),
        )
        > 1e-3
    )
    for k in range(1, length + 1):
        chosen = counts == k
        ranks = beta_cdf(rate[chosen], k, length)
        assert ks_statistic(ranks) < 1.95
        for position in range(length):
            hit = noise.corrupted[chosen, position]
            if hit.all():
                continue
            assert ks_statistic(ranks[hit]) < 1.95
            assert ks_statistic(ranks[~hit]) < 1.95


def test_subset_given_count_and_rate_is_uniform():
    rows = 60_000
    key = torch.arange(rows)[:, None]
    v = uniforms(9, Stream.JITTER, row=key)
    u = uniforms(9, Stream.POSITION, row=key, position=torch.arange(LENGTH))
    noise = noise_by_count(NoiseUniforms(v, u), family().blocks(LENGTH))
    rate = 1.0 - noise.alpha[:, 0]
    for k in (1, 2):
        for high in (False, True):
            chosen = (noise.corrupted.sum(1) == k) & ((rate > 0.5) == high)
            missing = noise.corrupted[chosen].double().sum(0)
            # Positions of one draw exclude each other; for k = 2 count the position left out.
            cells = missing if k == 1 else chosen.sum() - missing
            assert chi_square_p(cells, torch.full((3,), float(cells.sum()) / 3).double()) > 1e-3


def test_noise_by_time_is_the_schedules():
    for schedule in IDEAL:
        chosen = family(schedule=schedule)
        v = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)
        u = torch.full((3, LENGTH), 0.5, dtype=torch.float64)
        noise = noise_by_time(chosen.schedule, NoiseUniforms(v, u), chosen.blocks(LENGTH))
        assert torch.equal(noise.weight, chosen.schedule.elbo_weight(v).expand(3, LENGTH))
        assert torch.equal(noise.alpha, chosen.schedule.alpha(v).expand(3, LENGTH))
        assert torch.equal(
            noise.corrupted, (1.0 - chosen.schedule.alpha(v) > 0.5).expand(3, LENGTH)
        )
