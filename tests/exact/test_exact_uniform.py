"""Identities 10 and 11: the bound of uniform noise, and what its optimum is."""

import math
from types import SimpleNamespace

import pytest
import torch
from dense_tables import (
    K,
    expected,
    kernel,
    likelihoods,
    nelbo,
    noise_at,
    oracle,
    position_nats,
    sequences,
    time_grid,
    world,
)
from exact_tables import CLEAN, MASK, ROWS, all_sequences, random_joint
from torch import Tensor

from textdiff.likelihood.scorer import reconstruction

TIMES = torch.tensor([0.03, 0.2, 0.5, 0.8, 0.97], dtype=torch.float64)
PAIRS = [(x, z) for x in CLEAN for z in CLEAN]


def random_x0(seed: int = 0) -> Tensor:
    """[ROWS] a distribution over clean tokens."""
    raw = torch.randn(K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = torch.zeros(ROWS, dtype=torch.float64)
    p[list(CLEAN)] = (1.5 * raw).softmax(0)
    return p


def found(family, p: Tensor, x: int, z: int, t: Tensor) -> Tensor:
    """[Q] the library's nats per unit of time, of raw logits with junk where none may look."""
    logits = (p.log() + 3.0).expand(len(t), -1).clone()
    logits[:, MASK], logits[:, 4] = 30.0, torch.nan
    noise, tokens = noise_at(family, t), torch.full((len(t),), z)
    prediction = family.objective.predict(logits, tokens, noise.alpha)
    return family.objective.nelbo_terms(prediction, torch.full_like(tokens, x), tokens, noise)


def posterior(p: Tensor, z: int, s: Tensor, t: Tensor, process: str = "uniform") -> Tensor:
    """[ROWS] q(x_s | x_t = z, x_0 ~ p), with p plugged into Bayes' rule."""
    alpha_s, at_s = kernel(process, s)
    alpha_t, _ = kernel(process, t)
    onward = alpha_t / alpha_s * torch.eye(ROWS, dtype=torch.float64)[z]
    onward[list(CLEAN)] += (1.0 - alpha_t / alpha_s) / K
    back = (at_s @ p) * onward
    return back / back.sum()


def point(x: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(x), ROWS).double()


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_udlm_is_the_rate_of_the_divergence_of_one_small_step(x, z):
    p, h = random_x0(), 1e-6
    for t, value in zip(TIMES, found(world("uniform", "udlm"), p, x, z, TIMES), strict=True):
        q, model = posterior(point(x), z, t - h, t), posterior(p, z, t - h, t)
        kl = torch.special.xlogy(q, q / model).nan_to_num(0.0).sum() / h
        assert float(value) == pytest.approx(float(kl), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_udlm_is_its_published_closed_form(x, z):
    """Eq. 18 of arXiv:2412.10193: xbar = K alpha x + 1 - alpha, sums over every token j."""
    p = random_x0()
    for t, value in zip(TIMES, found(world("uniform", "udlm"), p, x, z, TIMES), strict=True):
        alpha = 1.0 - t
        bar = (K * alpha * point(x) + 1.0 - alpha)[list(CLEAN)]
        bar_p = (K * alpha * p + 1.0 - alpha)[list(CLEAN)]
        at = CLEAN.index(z)
        ratios = bar / bar[at] * torch.log(bar_p[at] * bar / (bar_p * bar[at]))
        exact = -1.0 / (K * alpha) * (K / bar[at] - K / bar_p[at] - ratios.sum())
        assert float(value) == pytest.approx(float(exact), abs=1e-12, rel=1e-12)


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_score_entropy_of_the_mean_score_is_the_same_number(x, z):
    p = random_x0()
    exact = found(world("uniform", "udlm"), p, x, z, TIMES)
    for t, value in zip(TIMES, exact, strict=True):
        q = kernel("uniform", t)[1] @ p
        score = world("uniform", "sedd")
        raw = torch.zeros(1, ROWS, dtype=torch.float64)
        raw[0, list(CLEAN)] = (q / q[z]).log()[list(CLEAN)]
        raw[0, z] = 7.0  # the current token's own entry is no output
        noise, at = noise_at(score, t[None]), torch.tensor([z])
        raw = raw / score.objective.scale(noise.alpha)
        prediction = score.objective.predict(raw, at, noise.alpha)
        nats = score.objective.nelbo_terms(prediction, torch.tensor([x]), at, noise)
        assert float(nats) == pytest.approx(float(value), abs=1e-12, rel=1e-12)
        log_x0 = prediction.log_x0[0, list(CLEAN)]
        assert (log_x0 - p[list(CLEAN)].log()).abs().max() < 1e-9


@pytest.mark.parametrize("length", [1, 2])
def test_leave_one_out_oracle_has_the_likelihood(length):
    joint = random_joint(3, length)
    family = world("uniform", "udlm")
    for index in range(0, len(joint), 2):
        value = nelbo(
            family, "uniform", lambda t: oracle("uniform", joint, t, length, True), index, 90
        )
        assert value == pytest.approx(-math.log(joint[index]), abs=1e-8)


def test_posterior_given_everything_is_no_optimum():
    joint = random_joint(3, 2)
    family = world("uniform", "udlm")
    values = [
        nelbo(family, "uniform", lambda t: oracle("uniform", joint, t, 2, False), index)
        for index in range(len(joint))
    ]
    gap = sum(float(p) * (v + math.log(p)) for p, v in zip(joint, values, strict=True))
    assert gap > 0.05


def test_score_entropy_oracle_has_the_likelihood():
    joint = random_joint(4, 2)
    family = world("uniform", "sedd")

    def scores(t):
        """Outputs whose log ratios to the current token are the true ones."""
        p = oracle("uniform", joint, t, 2, True).exp()
        q = torch.einsum("qzx,qslx->qslz", kernel("uniform", t)[1], p).log()
        at = sequences("uniform", 2)[None, :, :, None].expand(len(t), -1, -1, 1)
        scale = family.objective.scale(family.schedule.alpha(t))
        return (q - q.gather(-1, at)) / scale.view(-1, 1, 1, 1)

    for index in range(0, len(joint), 2):
        value = nelbo(family, "uniform", scores, index, 90)
        assert value == pytest.approx(-math.log(joint[index]), abs=1e-8)


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_score_entropy_stays_bounded_for_any_outputs_as_everything_is_lost(x, z):
    """Scores that kept away from 1 would cost 1 / alpha."""
    family = world("uniform", "sedd")
    generator = torch.Generator().manual_seed(5)
    alpha = torch.tensor([1e-2, 1e-4, 1e-6], dtype=torch.float64)
    for _ in range(5):
        raw = 3.0 * torch.randn(1, ROWS, generator=generator, dtype=torch.float64)
        noise, at = noise_at(family, 1.0 - alpha), torch.full((3,), z)
        prediction = family.objective.predict(raw.expand(3, -1), at, noise.alpha)
        nats = family.objective.nelbo_terms(prediction, torch.full_like(at, x), at, noise)
        assert (nats >= 0.0).all()
        assert float(nats[1]) < 2.0 * float(nats[0]) + 0.1
        assert float(nats[2]) < float(nats[1]) + 0.01
        assert prediction.log_score[2, list(CLEAN)].abs().max() < 1e-4
        assert prediction.log_score[2, [MASK]].isinf().all()


def revealed(family, logits: Tensor, t: float, x: Tensor) -> Tensor:
    """[S, L] the library's -log p(x_0 | x_t) of logits [S, L, ROWS] at every noisy sequence."""
    xt = sequences("uniform", len(x))
    noise = noise_at(family, torch.full((xt.numel(),), t, dtype=torch.float64))
    prediction = family.objective.predict(logits.flatten(0, 1), xt.flatten(), noise.alpha)
    terms = SimpleNamespace(
        noise=noise, xt=xt.flatten(), x0=x.expand_as(xt).flatten(), objective=family.objective
    )
    return reconstruction(terms, slice(None), prediction).view_as(xt)


@pytest.mark.parametrize("cut", [1e-2, 1e-3])
def test_cut_off_time_is_made_up_for_by_reconstruction(cut):
    """Integral over [cut, 1], -ln p(x_0 | x_cut) by factors, and no prior at alpha = 0."""
    joint, length = random_joint(3, 2), 2
    family = world("uniform", "udlm")
    t, weight = time_grid(80, cut)
    start = torch.tensor([cut], dtype=torch.float64)
    chance = likelihoods("uniform", start, length)[0]  # [S, X, L]
    given = oracle("uniform", joint, start, length, False)[0]  # [S, L, ROWS]
    left_out = oracle("uniform", joint, start, length, True)[0]
    for index, x in enumerate(all_sequences(length)):
        logits = oracle("uniform", joint, t, length, True)
        terms = position_nats(family, logits, t, x, "uniform")
        integral = float((weight * expected("uniform", t, terms, index)).sum())
        reveal = revealed(family, left_out, cut, x)
        assert (reveal + given[:, torch.arange(length), x]).abs().max() < 1e-10
        assert integral < -math.log(joint[index])
        total = integral + float((chance[:, index].prod(-1) * reveal.sum(-1)).sum())
        assert abs(total + math.log(joint[index])) < 2.0 * cut


def test_prior_term_of_a_schedule_that_keeps_some_tokens():
    process = world("uniform", "udlm").process
    for alpha in (0.0, 1e-3, 0.2):
        q = kernel("uniform", torch.tensor(1.0 - alpha, dtype=torch.float64))[1][
            list(CLEAN), CLEAN[0]
        ]
        exact = float((q * (q * K).log()).sum())
        assert process.prior_kl(alpha) == pytest.approx(exact, abs=1e-12)
