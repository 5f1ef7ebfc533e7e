import math

import pytest
import torch

from textdiff.diffusion import SCHEDULES
from textdiff.diffusion.schedule import LogLinear

CASES = [
    ("loglinear", {}),
    ("loglinear", {"eps": 1e-3}),
    ("cosine", {}),
    ("polynomial", {"exponent": 0.5}),
    ("polynomial", {"exponent": 1.0}),
    ("polynomial", {"exponent": 2.0}),
    ("polynomial", {"exponent": 3.7}),
    ("geometric", {}),
    ("geometric", {"sigma_min": 1e-3, "sigma_max": 5.0}),
    ("hybrid", {"uniform": 0.1}),
    ("hybrid", {"uniform": 0.6}),
    ("learned", {}),
]
INSIDE = torch.linspace(0.0, 1.0, 203, dtype=torch.float64)[1:-1]


@pytest.fixture(params=CASES, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def schedule(request):
    kind, options = request.param
    return SCHEDULES.build(kind, options)


def test_every_registered_schedule_is_tested():
    assert {kind for kind, _ in CASES} == set(SCHEDULES)


def test_alpha_falls_between_one_and_zero(schedule):
    alpha = schedule.alpha(INSIDE)
    assert (alpha.diff() < 0).all()
    assert ((alpha > 0) & (alpha < 1)).all()


def test_t_of_alpha_inverts_alpha(schedule):
    assert (schedule.t_of_alpha(schedule.alpha(INSIDE)) - INSIDE).abs().max() < 1e-10
    assert (schedule.alpha(schedule.t_of_alpha(INSIDE)) - INSIDE).abs().max() < 1e-12


def test_dalpha_is_the_derivative(schedule):
    t = INSIDE.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    exact = schedule.dalpha(INSIDE)
    assert ((derivative - exact) / exact).abs().max() < 1e-10
    assert exact.shape == INSIDE.shape


def test_sigma_and_weight_follow_from_alpha(schedule):
    alpha = schedule.alpha(INSIDE)
    assert ((schedule.sigma(INSIDE) + alpha.log()) / alpha.log()).abs().max() < 1e-10
    weight = -schedule.dalpha(INSIDE) / (1.0 - alpha)
    assert ((schedule.elbo_weight(INSIDE) - weight) / weight).abs().max() < 1e-10


def test_weight_is_minus_the_slope_of_the_log_mask_rate(schedule):
    """-alpha' / (1 - alpha) = d ln(1 - alpha) / dt, whatever the schedule."""
    t = INSIDE.clone().requires_grad_()
    (slope,) = torch.autograd.grad(torch.log(-torch.expm1(-schedule.sigma(t))).sum(), t)
    assert ((schedule.elbo_weight(INSIDE) - slope) / slope).abs().max() < 1e-8


@pytest.mark.parametrize(
    ("kind", "options", "ideal"),
    [
        ("loglinear", {}, True),
        ("loglinear", {"eps": 1e-3}, False),
        ("cosine", {}, True),
        ("polynomial", {"exponent": 2.0}, True),
        ("geometric", {}, False),
        ("hybrid", {}, True),
        ("learned", {}, True),
    ],
)
def test_which_schedules_are_ideal(kind, options, ideal):
    """Those whose alpha is exactly 1 at t = 0 and exactly 0 at t = 1."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    zero, one = SCHEDULES.build(kind, options).alpha(ends).tolist()
    assert (zero == 1.0 and abs(one) < 1e-15) is ideal


def test_published_values():
    t = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert LogLinear(eps=1e-3).alpha(t).tolist() == pytest.approx([0.75025, 0.5005], abs=1e-15)
    assert SCHEDULES.build("loglinear").elbo_weight(t).tolist() == pytest.approx([4.0, 2.0])
    cosine = [1.0 - math.cos(0.5 * math.pi * 0.75), 1.0 - math.cos(0.25 * math.pi)]
    assert SCHEDULES.build("cosine").alpha(t).tolist() == pytest.approx(cosine, abs=1e-15)
    geometric = SCHEDULES.build("geometric")
    assert float(geometric.sigma(t[1])) == pytest.approx(math.sqrt(1e-4 * 20.0), rel=1e-12)
