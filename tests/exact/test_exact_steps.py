"""Steps drawn with their hits, every draw enumerated: no bias, no weight without limit."""

import pytest
import torch
from dense_tables import STATES, drifting_logits, world
from exact_tables import all_sequences
from test_exact_discrete_time import bound
from torch import Tensor

from textdiff.diffusion import SCHEDULES
from textdiff.diffusion.family import Blocks
from textdiff.diffusion.noise import Noise, NoiseUniforms
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.likelihood.estimators.noise_levels import (
    _chances_without_hits,
    noise_by_step_and_hits,
)

OPTIONS = [
    {"kind": "loglinear"},
    {"kind": "cosine"},
    {"kind": "polynomial", "exponent": 9.0},
    {"kind": "geometric", "sigma_min": 0.1, "sigma_max": 3.0},
]


def levels(schedule: NoiseSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """[T] survival at each step's end, and what is lost in it."""
    alphas = schedule.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps)
    return alphas[1:], alphas[:-1] - alphas[1:]


def middles(chances: Tensor) -> Tensor:
    """[T] the middle of each part of (0, 1) whose lengths are `chances`."""
    return chances.cumsum(0) - chances / 2


def draw(
    schedule: NoiseSchedule, steps: int, v: Tensor, n: int, u_token: Tensor | None = None
) -> Noise:
    u = torch.linspace(0.3, 0.9, n, dtype=torch.float64).expand(len(v), n)
    scorable = torch.ones(len(v), n, dtype=torch.bool)
    uniforms = NoiseUniforms(v[:, None], u, u_token)
    return noise_by_step_and_hits(
        schedule, steps, uniforms, Blocks.of(n, None), scorable, dense=True
    )


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_without_hits_weigh_what_they_are_drawn_too_rarely(options, n):
    """Chance times weight is the chance to hit nothing in a step, times its masked weight."""
    schedule, steps = SCHEDULES.build(options["kind"], options), 40
    alpha, shares = levels(schedule, steps)
    quiet = shares * alpha**n
    chances = _chances_without_hits(quiet, 1.0 - alpha)
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)
    kept = chances > 1e-9
    noise = draw(schedule, steps, (middles(chances) / (n + 1))[kept], n)
    assert not bool(noise.corrupted.any())
    assert (noise.alpha[:, 0] - alpha[kept]).abs().max() < 1e-12
    weighed = noise.weight[:, 0] * chances[kept] / (n + 1)
    exact = quiet[kept] / (1.0 - alpha[kept])
    assert (weighed / exact - 1.0).abs().max() < 1e-10


@pytest.mark.parametrize("steps", [10, 1000])
def test_neither_a_constant_cost_nor_one_of_the_first_steps_varies_without_limit(steps):
    """At most twice the sum of all steps, whatever T: a uniform step would weigh up to T times."""
    alpha, shares = levels(SCHEDULES.build("loglinear"), steps)
    quiet, rate = shares * alpha**3, 1.0 - alpha
    chances = _chances_without_hits(quiet, rate)
    for cost in (torch.ones_like(rate), 1.0 / rate):
        weighed = (quiet * cost / chances)[quiet > 0.0]
        assert float(weighed.max()) <= 2.0 * float((quiet * cost).sum()) + 1e-12
    uniform = float((1.0 / rate).max() * quiet.sum())  # what it was before: T / ln T of the sum
    assert uniform > 0.02 * steps * float((quiet / rate).sum())


def test_one_step_never_misses_and_weighs_nothing_where_it_would():
    noise = draw(SCHEDULES.build("loglinear"), 1, torch.tensor([0.01, 0.2, 0.9]).double(), 3)
    assert noise.weight[:2].abs().max() == 0.0
    assert float(noise.weight[2, 0]) == pytest.approx(4 / 3)


@pytest.mark.parametrize("parameterization", ["mixture", "plugged"])
@pytest.mark.parametrize("steps", [1, 3, 30])
def test_one_token_expects_its_bound_over_all_draws(steps, parameterization):
    """Every step without hits, and every step with every token: the mean is the bound."""
    family = world("uniform", "d3pm", timesteps=steps, parameterization=parameterization)
    alpha, shares = levels(family.schedule, steps)
    empty = _chances_without_hits(shares * alpha, 1.0 - alpha)
    hit = shares / shares.sum()
    tokens = STATES["uniform"]
    v = torch.cat([middles(empty) / 2, (0.5 + middles(hit) / 2).repeat_interleave(len(tokens))])
    chance = torch.cat([empty / 2, (hit / 2 / len(tokens)).repeat_interleave(len(tokens))])
    kept = chance > 0.0
    u_token = (torch.arange(len(v)) % len(tokens) + 0.5).double() / len(tokens)
    u_token[steps:] = ((torch.arange(steps * len(tokens)) % len(tokens)) + 0.5) / len(tokens)
    v, chance, u_token = v[kept], chance[kept], u_token[kept]
    noise = draw(family.schedule, steps, v, 1, u_token=u_token[:, None])

    def network(t: Tensor) -> Tensor:
        return drifting_logits("uniform", t, 1)

    for index, x in enumerate(all_sequences(1)):
        x0 = x.expand(len(v), 1)
        xt = family.process.corrupt(x0, noise)
        state = torch.tensor([tokens.index(int(z)) for z in xt[:, 0]])
        logits = network(1.0 - noise.alpha[:, 0])[torch.arange(len(v)), state, 0]
        flat = noise.at(torch.arange(len(v)))
        prediction = family.objective.predict(logits, xt[:, 0], flat.alpha)
        nats = family.objective.nelbo_terms(prediction, x0[:, 0], xt[:, 0], flat)
        exact = bound(family, "uniform", network, index, 1)
        assert float((chance * nats).sum()) == pytest.approx(exact, abs=1e-10)
