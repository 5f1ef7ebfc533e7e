"""Draws of steps and hits: their expectation is the bound in T steps, of texts of any length."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_exact_estimators_dense import dense_family
from tiny_models import CLEAN, tiny_model

from textdiff.diffusion.noise import Noise
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows

COPIES, STEPS = 3000, 16


def enumerated(model, family, text: tuple[int, ...]) -> float:
    """The bound of one text: every step, every noisy text."""
    total, count = 0.0, len(CLEAN)
    noisy = torch.tensor(list(itertools.product(CLEAN, repeat=len(text))))
    x0 = torch.tensor(text).expand_as(noisy)
    for step in range(STEPS):
        times = torch.tensor([step, step + 1], dtype=torch.float64) / STEPS
        alpha_s, alpha = family.schedule.alpha(times)
        chance = torch.where(noisy == x0, alpha + (1 - alpha) / count, (1 - alpha) / count)
        sigma = -family.known_alpha(alpha[None]).log().float().expand(len(noisy), 1)
        with torch.no_grad():
            logits = model(noisy, sigma=sigma).logits.flatten(0, 1)
        flat = torch.ones(noisy.numel(), dtype=torch.float64)
        weight = STEPS * (alpha_s - alpha) / (1.0 - alpha)
        noise = Noise(alpha * flat, 0 * flat, 0 * flat, weight * flat, None, alpha_s * flat)
        prediction = family.objective.predict(logits, noisy.flatten(), noise.alpha)
        nats = family.objective.nelbo_terms(prediction, x0.flatten(), noisy.flatten(), noise)
        total += float((chance.prod(1) * nats.view_as(noisy).sum(1)).sum()) / STEPS
    return total


@pytest.mark.parametrize("kind", ["mixture", "plugged"])
@pytest.mark.parametrize("text", [(CLEAN[3],), (CLEAN[3], CLEAN[1])])
def test_the_mean_over_draws_is_the_enumerated_bound(text, kind):
    """Short texts: draws that hit nothing are half and a third of all, and weigh the most."""
    model = tiny_model(adaln=True, time_conditioning=True)
    schedule = {"kind": "loglinear"}
    family = dense_family("uniform", "d3pm", schedule, STEPS, parameterization=kind)
    array = np.array(text, dtype=np.int32)
    clean = family.process.vocabulary.clean
    windows = cut_windows([array] * COPIES, ["a"] * COPIES, 4, clean)
    found = estimate(model, family, windows, estimator="finite_t", seed=0)
    nats = found.parts["diffusion"].flatten()
    error = float(nats.std()) / math.sqrt(len(nats))
    exact = enumerated(model, family, text)
    assert error < 0.02 * exact
    assert abs(float(nats.mean()) - exact) < 4 * error
