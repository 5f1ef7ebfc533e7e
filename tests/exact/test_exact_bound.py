"""Identities 1, 2, 14 and 29 of the spec: the estimator by count is the masked bound, exactly."""

import itertools
import math
from statistics import fmean

import pytest
import torch
from exact_tables import (
    CLEAN,
    LENGTH,
    MASK,
    TableDenoiser,
    all_sequences,
    family,
    oracle,
    random_joint,
    random_table,
    subsets,
)
from noise_calls import noise_by_count
from torch import Tensor

from textdiff.diffusion.noise import NoiseUniforms
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.loss import PositionTerms, corrupt

TEXTS = all_sequences()


def nats(denoiser, family, x0: Tensor, v: Tensor, u: Tensor, real: Tensor | None = None) -> Tensor:
    """[B] nats of the library's estimator for given uniforms."""
    noise = noise_by_count(NoiseUniforms(v, u), family.blocks(x0.shape[1]), scorable=real)
    ids = None if real is None else real.to(torch.int64) - 1
    batch = corrupt(family, x0, noise, ids)
    terms = PositionTerms(denoiser, family, batch).all()
    return x0.new_zeros(len(x0), dtype=torch.float64).index_add(
        0, batch.positions // x0.shape[1], terms
    )


def every_draw(length: int, levels: int) -> tuple[Tensor, Tensor]:
    """[cells, 1] counts and [cells, L] orders: every permutation times `levels` equal strata."""
    orders = torch.tensor(list(itertools.permutations(range(length))), dtype=torch.float64)
    strata = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    u = ((orders + 0.5) / length).repeat_interleave(levels, 0)
    return strata.repeat(len(orders))[:, None], u


def expected_nats(denoiser, family, x: Tensor) -> float:
    """The estimator's exact expectation for one text."""
    length = len(x)
    v, u = every_draw(length, math.factorial(length))  # divisible by every block's length
    v = v.expand(-1, family.blocks(length).count)
    return float(nats(denoiser, family, x.expand(len(u), -1), v, u).detach().mean())


@pytest.fixture(scope="module")
def arbitrary():
    return random_table(0)


@pytest.fixture(scope="module")
def joint():
    return random_joint(3)


def test_every_count_hits_exactly_that_many_and_every_subset_equally_often():
    v, u = every_draw(LENGTH, LENGTH)
    hit = noise_by_count(NoiseUniforms(v, u), family().blocks(LENGTH)).corrupted
    assert hit.sum(1).tolist() == [1, 2, 3] * math.factorial(LENGTH)
    found = [tuple(row.nonzero().flatten().tolist()) for row in hit]
    for subset in subsets():
        share = found.count(subset) / len(found)
        assert share == pytest.approx(1 / (LENGTH * math.comb(LENGTH, len(subset))), abs=1e-15)


def test_mean_over_counts_and_orders_is_the_masked_bound(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    for x in TEXTS:
        assert expected_nats(denoiser, family(), x) == pytest.approx(arbitrary.nelbo(x), abs=1e-12)


def test_bound_of_arbitrary_conditionals_is_the_mean_chain_over_orders(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    for x in TEXTS:
        chains = [arbitrary.chain(x, order) for order in itertools.permutations(range(LENGTH))]
        assert expected_nats(denoiser, family(), x) == pytest.approx(fmean(chains), abs=1e-12)


@pytest.mark.parametrize("block_size", [None, 1, 2, 3])
def test_oracle_bound_is_the_likelihood_at_every_block_size(joint, block_size):
    denoiser = TableDenoiser(oracle(joint))
    for x, p in zip(TEXTS, joint, strict=True):
        value = expected_nats(denoiser, family(block_size), x)
        assert value == pytest.approx(-math.log(p), abs=1e-12)


def test_blocks_of_one_token_are_autoregressive(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    v, u = every_draw(LENGTH, LENGTH)
    for x in TEXTS:
        chain = arbitrary.chain(x, tuple(range(LENGTH)))
        found = nats(denoiser, family(1), x.expand(len(u), -1), v.expand(-1, LENGTH), u)
        assert (found - chain).abs().max() < 1e-12  # whatever the noise: no variance at all


def test_one_block_is_the_masked_bound(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    for x in TEXTS:
        value = expected_nats(denoiser, family(LENGTH), x)
        assert value == pytest.approx(arbitrary.nelbo(x), abs=1e-12)


def test_blocks_of_two_read_the_clean_past_and_nothing_later(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    for x in TEXTS:
        chains = [arbitrary.chain(x, order) for order in ((0, 1, 2), (1, 0, 2))]
        assert expected_nats(denoiser, family(2), x) == pytest.approx(fmean(chains), abs=1e-12)


@pytest.mark.parametrize("block_size", [None, 2])
def test_padding_takes_no_part(joint, block_size):
    """A text of two tokens, padded to three, has the bound of its own (marginal) distribution."""
    marginal = joint.view(3, 3, 3).sum(-1)
    denoiser = TableDenoiser(oracle(joint))
    v, u = every_draw(LENGTH, 6)
    v = v.expand(-1, family(block_size).blocks(LENGTH).count)
    real = torch.tensor([True, True, False]).expand(len(u), -1)
    for first, second in itertools.product(range(3), repeat=2):
        x = torch.tensor([CLEAN[first], CLEAN[second], MASK]).expand(len(u), -1)
        value = float(nats(denoiser, family(block_size), x, v, u, real).mean())
        assert value == pytest.approx(-math.log(marginal[first, second]), abs=1e-12)


def test_one_position_costs_its_cross_entropy_without_variance():
    table = random_table(5, length=1)
    x0 = all_sequences(1)
    v, u = torch.tensor([[0.01], [0.5], [0.99]]), torch.tensor([[0.9], [0.2], [0.4]])
    found = nats(TableDenoiser(table), family(), x0, v.double(), u.double())
    exact = [-float(table.log_p[MASK, 0, token]) for token in CLEAN]
    assert found.tolist() == pytest.approx(exact, abs=1e-12)


def test_a_vocabulary_of_one_token_costs_nothing():
    table = random_table(6)
    table.log_p[..., list(CLEAN)] = torch.tensor([0.0, -torch.inf, -torch.inf]).double()
    x = torch.zeros(LENGTH, dtype=torch.int64)
    v, u = every_draw(LENGTH, LENGTH)
    found = nats(TableDenoiser(table), family(), x.expand(len(u), -1), v, u)
    assert found.abs().max() == 0.0


# --- the same through the public estimator -------------------------------------------------------


def one_document_per_text(family):
    texts = ["abc"] * len(TEXTS)
    clean = family.process.vocabulary.clean
    return cut_windows([x.to(torch.int32).numpy() for x in TEXTS], texts, LENGTH, clean)


@pytest.mark.parametrize("block_size", [None, 2])
def test_masked_count_is_unbiased_for_every_document(arbitrary, block_size):
    chosen = family(block_size)
    denoiser = TableDenoiser(arbitrary)
    estimates = estimate(denoiser, chosen, one_document_per_text(chosen), seed=11, replicates=400)
    exact = torch.tensor([expected_nats(denoiser, chosen, x) for x in TEXTS])
    bound = estimates.bound()
    assert abs(bound.mean - float(exact.mean()) / LENGTH) < 4 * bound.stderr
    for index, value in enumerate(exact):
        document = estimates.document(index)
        assert abs(document.mean - float(value) / LENGTH) < 4 * document.stderr


def test_masked_count_of_the_oracle_is_the_likelihood(joint):
    windows = one_document_per_text(family())
    estimates = estimate(TableDenoiser(oracle(joint)), family(), windows, seed=2, replicates=400)
    bound = estimates.bound()
    exact = -float(joint.log().mean()) / LENGTH
    assert abs(bound.mean - exact) < 4 * bound.stderr
    assert bound.is_bound
    assert bound.tokens == LENGTH * len(TEXTS)


@pytest.mark.slow
def test_stated_errors_cover_the_truth_as_often_as_they_say(arbitrary):
    denoiser = TableDenoiser(arbitrary)
    windows = one_document_per_text(family())
    exact = fmean(arbitrary.nelbo(x) for x in TEXTS) / LENGTH
    repetitions = 300
    covered = 0
    for seed in range(repetitions):
        low, high = estimate(denoiser, family(), windows, seed=seed).bound().interval(0.95)
        covered += low <= exact <= high
    assert 0.91 <= covered / repetitions <= 0.985


def test_a_document_of_many_windows_is_stratified_over_them(arbitrary):
    """Nine equal windows meet every count three times in every replicate."""
    x = TEXTS[7]
    document = x.repeat(9).to(torch.int32).numpy()
    windows = cut_windows([document], ["a" * 27], LENGTH, family().process.vocabulary.clean)
    counts: list[int] = []

    class Counting(TableDenoiser):
        def hidden(self, input_ids, *rest):
            counts.extend((input_ids == MASK).sum(1).tolist())
            return super().hidden(input_ids, *rest)

    estimate(Counting(arbitrary), family(), windows, seed=0, replicates=8, samples=1)
    assert len(counts) == 8 * 9
    for replicate in range(8):
        drawn = sorted(counts[9 * replicate : 9 * replicate + 9])
        assert drawn == [1, 1, 1, 2, 2, 2, 3, 3, 3]
