"""Identity 32 for noise that draws tokens: counts from zero, rates and subsets are unbiased."""

import math

import pytest
import torch
from dense_tables import drifting_logits, nelbo, sequences, world
from exact_stats import beta_cdf, chi_square_p, ks_statistic
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences
from noise_calls import noise_by_count, noise_by_time

from textdiff.diffusion.family import Blocks
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.randomness import Stream, uniforms

FAMILIES = {"udlm": "uniform", "sedd": "uniform", "gidd": "hybrid"}
DRAWS = 200_000


def draws(rows: int, blocks: Blocks, scorable=None, seed: int = 0, draw: str = "count"):
    key = torch.arange(rows)[:, None]
    v = uniforms(seed, Stream.JITTER, row=key, block=torch.arange(blocks.count))
    at = torch.arange(blocks.length)
    u = uniforms(seed, Stream.POSITION, row=key, position=at)
    u_token = uniforms(seed, Stream.TOKEN, row=key, position=at)
    return v, u, u_token


def sampled_nats(family, process, x, size, scorable, draw):
    """[DRAWS, blocks] nats of the library's own noise for a network that reads a block alone."""
    blocks = Blocks.of(len(x), size)
    v, u, u_token = draws(DRAWS, blocks)
    real = scorable.expand(DRAWS, -1)
    if draw == "count":
        noise = noise_by_count(NoiseUniforms(v, u, u_token), blocks, scorable=real, dense=True)
    else:
        noise = noise_by_time(family.schedule, NoiseUniforms(v, u, u_token), blocks, scorable=real)
    x0 = x.expand(DRAWS, -1)
    xt = family.process.corrupt(x0, noise)
    assert torch.equal(xt[~real], x0[~real])
    nats = torch.zeros(DRAWS, blocks.count, dtype=torch.float64)
    lookup = sequences(process, 2) @ torch.tensor([ROWS, 1])
    for block in range(blocks.count):
        span = blocks.span(block)
        z = xt[:, span]
        seen = (z @ torch.tensor([ROWS, 1]))[:, None] == lookup[None]
        time = family.schedule.t_of_alpha(noise.alpha[:, span][:, 0])
        base = drifting_logits(process, torch.zeros(1, dtype=torch.float64), 2)[0]
        drift = drifting_logits(process, torch.full((1,), math.pi / 6).double(), 2)[0] - base
        row = seen.long().argmax(1)
        logits = base[row] + torch.sin(3.0 * time)[:, None, None] * drift[row]
        for column, position in enumerate(range(len(x))[span]):
            if not bool(scorable[position]):
                continue
            here = noise.map(lambda value, p=position: value.expand(x0.shape)[:, p])
            prediction = family.objective.predict(logits[:, column], xt[:, position], here.alpha)
            nats[:, block] += family.objective.nelbo_terms(
                prediction, x0[:, position], xt[:, position], here
            )
    return nats


@pytest.mark.parametrize("draw", ["count", "time"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_drawn_noise_expects_the_integral_in_every_block(kind, draw):
    process = FAMILIES[kind]
    family = world(process, kind)
    texts = all_sequences(2)
    x = torch.cat([texts[1], texts[5]])
    found = sampled_nats(family, process, x, 2, torch.ones(4, dtype=torch.bool), draw)
    for block, index in enumerate((1, 5)):
        exact = nelbo(family, process, lambda t: drifting_logits(process, t, 2), index, 80)
        error = float(found[:, block].std()) / math.sqrt(DRAWS)
        assert abs(float(found[:, block].mean()) - exact) < 4.0 * error
        assert error < 0.03 * exact


def test_positions_that_are_not_scored_are_neither_noised_nor_counted():
    """One open position beside a given one: its bound is that of a text of one token."""
    process, family = "uniform", world("uniform", "udlm")
    texts = all_sequences(2)
    found = sampled_nats(family, process, texts[5], 2, torch.tensor([True, False]), "count")

    def given(t):
        logits = drifting_logits(process, t, 2)
        rows = [
            int((sequences(process, 2) == torch.tensor([z, texts[5][1]])).all(1).nonzero())
            for z in CLEAN
        ]
        return logits[:, rows][:, :, :1]

    exact = nelbo(family, process, given, CLEAN.index(int(texts[5][0])), 80)
    error = float(found.std()) / math.sqrt(DRAWS)
    assert abs(float(found[:, 0].mean()) - exact) < 4.0 * error


@pytest.mark.parametrize("n", [1, 3, 8])
def test_counts_start_at_zero_and_rates_are_beta(n):
    rows, blocks = 60_000, Blocks.of(n, None)
    v, u, u_token = draws(rows, blocks, seed=4)
    noise = noise_by_count(NoiseUniforms(v, u, u_token), blocks, dense=True)
    counts, rate = noise.corrupted.sum(1), 1.0 - noise.alpha[:, 0]
    observed = torch.bincount(counts, minlength=n + 1).double()
    assert chi_square_p(observed, torch.full((n + 1,), rows / (n + 1), dtype=torch.float64)) > 1e-3
    for k in range(n + 1):
        chosen = counts == k
        exact = (n + 1.0) / k if k else 1.0 / rate[chosen]
        assert (noise.weight[chosen, 0] / exact - 1.0).abs().max() < 1e-9
        ranks = 1.0 - (1.0 - rate[chosen]) ** (n + 1) if k == 0 else beta_cdf(rate[chosen], k, n)
        assert ks_statistic(ranks) < 1.95


def test_uniform_tokens_are_clean_and_equally_likely():
    blocks = Blocks.of(6, None)
    for process, kind in (("uniform", "udlm"), ("hybrid", "gidd")):
        v, u, u_token = draws(20_000, blocks, seed=7)
        noise = noise_by_count(NoiseUniforms(v, u, u_token), blocks, dense=True)
        x0 = torch.full((20_000, 6), CLEAN[0])
        xt = world(process, kind).process.corrupt(x0, noise)[noise.corrupted]
        seen = torch.bincount(xt, minlength=ROWS).double()
        assert seen[EXCLUDED] == 0
        assert (seen[MASK] > 0) == (process == "hybrid")
        drawn = seen[list(CLEAN)]
        assert chi_square_p(drawn, torch.full((3,), float(drawn.sum()) / 3).double()) > 1e-3


@pytest.mark.parametrize("kind", [*FAMILIES, "mdlm"])
def test_every_scored_position_costs_nats_under_noise_that_draws_tokens(kind):
    blocks, rows = Blocks.of(4, 2), 50
    v, u, u_token = draws(rows, blocks)
    scorable = torch.tensor([True, True, False, True]).expand(rows, -1)
    noise = noise_by_count(
        NoiseUniforms(v, u, u_token), blocks, scorable=scorable, dense=kind != "mdlm"
    )
    found = world(FAMILIES.get(kind, "absorbing"), kind).objective.positions(noise)
    assert torch.equal(found, noise.corrupted if kind == "mdlm" else scorable)
