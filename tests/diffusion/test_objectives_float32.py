"""Objectives in float32 at the ends of the noise and with extreme logits, against float64."""

import pytest
import torch
from torch import Tensor

from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import Noise
from textdiff.diffusion.process import Vocabulary

ROWS = 50_000
CASES = {
    "mdlm": ("absorbing", "mdlm", {}, None),
    "sedd-absorbing": ("absorbing", "sedd", {}, None),
    "sedd-uniform": ("uniform", "sedd", {}, None),
    "udlm": ("uniform", "udlm", {}, None),
    "gidd": ("hybrid", "gidd", {}, None),
    "d3pm-absorbing": ("absorbing", "d3pm", {}, 1000),
    "d3pm-absorbing-plugged": ("absorbing", "d3pm", {"parameterization": "plugged"}, 1000),
    "d3pm-uniform": ("uniform", "d3pm", {}, 1000),
    "d3pm-uniform-plugged": ("uniform", "d3pm", {"parameterization": "plugged"}, 1000),
}


def nats(case: str, alpha: float, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nats [4] and the gradient of their sum: tokens that stayed and tokens that did not."""
    process, kind, options, timesteps = CASES[case]
    spec = {
        "process": process,
        "schedule": {"kind": "hybrid" if process == "hybrid" else "loglinear"},
        "objective": {"kind": kind, **options},
        "block_size": None,
        "timesteps": timesteps,
    }
    mask = ROWS - 1
    family = build_family(spec, Vocabulary.of(ROWS, mask, [ROWS - 2]))
    a = torch.full((4,), alpha, dtype=torch.float64)
    t = family.schedule.t_of_alpha(a)
    alpha_s, weight = None, family.schedule.elbo_weight(t)
    if timesteps:
        alpha_s = family.schedule.alpha((t - 1.0 / timesteps).clamp(min=0.0))
        weight = timesteps * (alpha_s - a) / (1.0 - a)
    noise = Noise(a, 1.0 - a, torch.zeros_like(a), weight, None, alpha_s)
    x0 = torch.tensor([5, 5, 6, 7])
    xt = torch.tensor([5, 9, 6, mask if process == "hybrid" else 8])
    xt = torch.full_like(xt, mask) if process == "absorbing" else xt
    raw = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(0))
    raw = 50.0 * raw.sign() if scale == 50.0 else raw
    logits = raw.to(dtype).requires_grad_()
    prediction = family.objective.predict(logits, xt, a)
    found = family.objective.nelbo_terms(prediction, x0, xt, noise)
    found.sum().backward()
    return found.detach(), logits.grad.double()


@pytest.mark.parametrize("alpha", [1e-7, 1e-3, 0.5, 1.0 - 1e-3, 1.0 - 1e-7])
@pytest.mark.parametrize("scale", [1.0, 50.0])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_finite_and_those_of_float64(case, scale, alpha):
    found, gradient = nats(case, alpha, scale, torch.float32)
    exact, exact_gradient = nats(case, alpha, scale, torch.float64)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert ((found - exact).abs() <= 5e-3 + 2e-5 * exact.abs()).all()
    size = exact_gradient.norm(dim=1)
    assert ((gradient - exact_gradient).norm(dim=1) <= 1e-3 + 1e-3 * size).all()
