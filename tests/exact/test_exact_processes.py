"""Identities 8 and 9 for every process: matrices, posteriors, scores and the law of `corrupt`."""

import itertools

import pytest
import torch
from dense_tables import STATES, UNIFORM, K, kernel, world
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS
from test_exact_uniform import point, random_x0
from torch import Tensor

from textdiff.diffusion.noise import Noise

KINDS = {"absorbing": "mdlm", "uniform": "udlm", "hybrid": "gidd"}
PROCESSES = list(KINDS)
TIMES = [0.1, 0.4, 0.7, 0.95]


def process_of(name: str):
    return world(name, KINDS[name]).process


def t_(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def transition(process, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
    """[ROWS, ROWS] q(x_t = row | x_s = column)."""
    states = torch.tensor([*CLEAN, MASK] if process.has_mask else CLEAN)
    matrix = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    at = alpha_s.expand(len(states)), alpha_t.expand(len(states))
    matrix[states] = process.likelihood(states, *at)
    return matrix


def rates(name: str, t: Tensor) -> Tensor:
    """[..., ROWS, ROWS] dq/dt = R q, from the derivative of the marginals by differences."""
    h = 1e-6
    states = list(STATES[name])
    alpha, before = kernel(name, t - h)
    _, after = kernel(name, t + h)
    slope = (after - before) / (2.0 * h)
    alpha = kernel(name, t)[0]
    decay = (kernel(name, t + h)[0] - kernel(name, t - h)[0]) / (2.0 * h) / alpha
    rate = torch.zeros(*t.shape, ROWS, ROWS, dtype=torch.float64)
    # q' = decay q + what arrives, the same from every state.
    alpha, decay = alpha.unsqueeze(-1), decay.unsqueeze(-1)
    other = kernel(name, t)[1][..., CLEAN[0]] - alpha * point(CLEAN[0])
    arrive = slope[..., CLEAN[0]] - decay * alpha * point(CLEAN[0]) - decay * other
    for y in states:
        rate[..., y] = arrive + decay * point(y)
    return rate


@pytest.mark.parametrize("name", PROCESSES)
def test_transition_is_the_exponential_of_the_rates(name):
    """By a product of many small exponentials: rates of hybrid noise change with time."""
    s, t, count = 0.2, 0.8, 2000
    states = list(STATES[name])
    product = torch.eye(len(states), dtype=torch.float64)
    middles = s + (torch.arange(count, dtype=torch.float64) + 0.5) * (t - s) / count
    for small in torch.linalg.matrix_exp(rates(name, middles) * (t - s) / count):
        product = small[states][:, states] @ product
    alpha = [kernel(name, t_(x))[0] for x in (s, t)]
    found = transition(process_of(name), *alpha)
    assert (found[states][:, states] - product).abs().max() < 1e-6
    assert (found[states].sum(0)[states] - 1.0).abs().max() < 1e-12
    assert found[EXCLUDED].abs().sum() == found[:, EXCLUDED].abs().sum() == 0.0


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_transition_is_the_matrix_exponential_of_published_rates(name):
    states = list(STATES[name])
    rate = torch.zeros(len(states), len(states), dtype=torch.float64)
    rate[len(states) - 1 if name == "absorbing" else slice(None)] = 1.0
    rate = rate / (K if name == "uniform" else 1.0) - torch.eye(len(states)).double()
    for s, t in itertools.combinations(TIMES, 2):
        alpha_s, alpha_t = t_(1.0 - s), t_(1.0 - t)
        exact = torch.linalg.matrix_exp((alpha_s.log() - alpha_t.log()) * rate)
        found = transition(process_of(name), alpha_s, alpha_t)[states][:, states]
        assert (found - exact).abs().max() < 1e-12


@pytest.mark.parametrize("name", PROCESSES)
def test_moves_compose_and_marginals_are_the_written_matrices(name):
    process = process_of(name)
    alphas = [kernel(name, t_(x))[0] for x in TIMES]
    for r, s, t in itertools.combinations(alphas, 3):
        whole = transition(process, s, t) @ transition(process, r, s)
        assert (whole - transition(process, r, t)).abs().max() < 1e-12
    for time, alpha in zip(TIMES, alphas, strict=True):
        matrix = kernel(name, t_(time))[1]
        for x in CLEAN:
            assert (process.marginal(point(x)[None], alpha[None])[0] - matrix[:, x]).abs().max() < (
                1e-12
            )
            at_zero = transition(process, t_(1.0), alpha)[:, x]
            assert (at_zero - matrix[:, x]).abs().max() < 1e-12


@pytest.mark.parametrize("mixture", [False, True], ids=["plugged", "mixture"])
@pytest.mark.parametrize("name", PROCESSES)
def test_posteriors_are_bayes_rule(name, mixture):
    process, p = process_of(name), random_x0()
    starts = [point(x) for x in CLEAN] + [p]
    for s, t in [(0.0, 0.4), (0.1, 0.7), (0.4, 1.0), (0.3, 0.3), (0.0, 1.0)]:
        alpha_s, at_s = kernel(name, t_(s))
        alpha_t, at_t = kernel(name, t_(t))
        move = transition(process, alpha_s, alpha_t)  # exact by the tests above
        for z, start in itertools.product(STATES[name], starts):
            if float((at_t @ start)[z]) < 1e-12 or (s == t and alpha_t > 0 and start is p):
                continue
            found = process.posterior(
                start.log()[None], torch.tensor([z]), alpha_s[None], alpha_t[None], mixture
            )[0]
            if name == "absorbing" and z != MASK:
                assert torch.equal(found, point(z))
                continue
            bayes = [at_s[:, w] * move[z] / (at_s[:, w] * move[z]).sum() for w in CLEAN]
            exact = sum(float(start[w]) * b for w, b in zip(CLEAN, bayes, strict=True) if start[w])
            if not mixture:
                exact = (at_s @ start) * move[z]
                exact = exact / exact.sum()
            assert (found - exact).abs().max() < 1e-12
            assert float(found.sum()) == pytest.approx(1.0, abs=1e-12)
            if s == t:
                assert float(found[z]) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_scores_and_clean_tokens_are_inverses(name):
    process, p = process_of(name), random_x0()
    for time, z in itertools.product(TIMES, STATES[name]):
        alpha, matrix = kernel(name, t_(time))
        q = matrix @ p
        if float(q[z]) == 0.0:
            continue
        score = process.log_score(p.log()[None], torch.tensor([z]), alpha[None])
        states = list(STATES[name])
        assert (score[0].exp()[states] - (q / q[z])[states]).abs().max() < 1e-10
        back = process.log_x0(score, torch.tensor([z]), alpha[None]).exp()[0]
        assert (back - p).abs().max() < 1e-10


@pytest.mark.parametrize("name", PROCESSES)
def test_staggered_scores_give_the_plugged_posterior(name):
    """Eq. 20 of arXiv:2310.16834: with a true score the analytic update is the posterior."""
    process, p = process_of(name), random_x0()
    for s, t in itertools.combinations(TIMES, 2):
        (alpha_s, at_s), (alpha_t, at_t) = kernel(name, t_(s)), kernel(name, t_(t))
        states = list(STATES[name])
        for z in states:
            at = torch.tensor([z])
            score = process.log_score(p.log()[None], at, alpha_t[None])
            staggered = process.staggered_score(score, alpha_s[None], alpha_t[None])[0]
            exact = (at_s @ p) / (at_t @ p)[z]
            assert (staggered - exact).abs().max() < 1e-10
            whole = staggered * process.likelihood(at, alpha_s[None], alpha_t[None])[0]
            assert float(whole.sum()) == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_any_score_is_staggered_by_the_inverse_of_the_move(name):
    """exp(-(sigma_t - sigma_s) Q) s, also for scores that no distribution has."""
    process, states = process_of(name), list(STATES[name])
    generator = torch.Generator().manual_seed(3)
    for s, t in itertools.combinations(TIMES, 2):
        alpha_s, alpha_t = (kernel(name, t_(x))[0] for x in (s, t))
        score = torch.randn(1, ROWS, generator=generator, dtype=torch.float64).exp()
        move = transition(process, alpha_s, alpha_t)[states][:, states]
        exact = torch.linalg.solve(move, score[0, states])
        found = process.staggered_score(score.log(), alpha_s[None], alpha_t[None])[0, states]
        assert ((found - exact) / exact.abs().max()).abs().max() < 1e-12


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("time", [0.0, 0.3, 0.75, 1.0])
def test_law_of_corrupt_by_walking_a_grid_of_uniforms(name, time):
    process, cells = process_of(name), 1200
    alpha, matrix = kernel(name, t_(time))
    side = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    u, u_token = (x.flatten()[None] for x in torch.meshgrid(side, side, indexing="ij"))
    full = torch.full_like(u, float(alpha))
    noise = Noise(full, 1.0 - full, u, torch.ones_like(u), u_token)
    for x in CLEAN[:2]:
        tokens = process.corrupt(torch.full(u.shape, x), noise)
        law = torch.bincount(tokens[0], minlength=ROWS).double() / u.numel()
        assert (law - matrix[:, x]).abs().max() < 3.0 / cells
        assert law[EXCLUDED] == 0.0


def test_prior_is_what_noise_ends_as():
    u = ((torch.arange(999, dtype=torch.float64) + 0.5) / 999).view(27, 37)
    for name in PROCESSES:
        tokens = process_of(name).prior((27, 37), u)
        law = torch.bincount(tokens.flatten(), minlength=ROWS).double() / 999
        exact = kernel(name, t_(1.0))[1][:, CLEAN[0]]
        assert (law - exact).abs().max() < 1e-12


def test_processes_that_draw_tokens_say_that_they_need_uniforms():
    for name in ("uniform", "hybrid"):
        with pytest.raises(ValueError, match="needs uniforms"):
            process_of(name).prior((1, 2))


def test_share_of_uniform_noise_peaks_at_the_configured_value():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    _, b = process_of("hybrid").shares(kernel("hybrid", t)[0])
    assert float((K * b).max()) == pytest.approx(UNIFORM, abs=1e-12)
    assert int((K * b).argmax()) == 49
