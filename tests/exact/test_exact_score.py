"""Identities 7 and 26 for masks: score entropy is cross-entropy and a penalty for its total."""

import math

import pytest
import torch
from dense_tables import K, kernel, noise_at, world
from exact_tables import CLEAN, MASK, ROWS
from test_exact_uniform import random_x0

TIMES = torch.tensor([0.02, 0.3, 0.6, 0.98], dtype=torch.float64)


def terms(family, raw, x: int):
    noise, at = noise_at(family, TIMES), torch.full((len(TIMES),), MASK)
    logits = raw.expand(len(TIMES), -1)
    prediction = family.objective.predict(logits, at, noise.alpha)
    return family.objective.nelbo_terms(prediction, torch.full_like(at, x), at, noise), prediction


@pytest.mark.parametrize("total", [1.0, 0.2, 3.5])
def test_score_entropy_is_cross_entropy_plus_the_excess_of_its_total(total):
    """r (Z - 1 - ln Z) per token for scores Z r c, with r = alpha / (1 - alpha)."""
    p = random_x0()
    raw = (total * K * p).log()
    raw[MASK], raw[4] = 40.0, torch.nan
    for x in CLEAN:
        found, prediction = terms(world("absorbing", "sedd"), raw, x)
        masked, _ = terms(world("absorbing", "mdlm"), p.log(), x)
        excess = (total - 1.0 - math.log(total)) / TIMES
        assert (found - masked - excess).abs().max() < 1e-9
        assert (prediction.log_x0[0].exp() - p).abs().max() < 1e-12


@pytest.mark.parametrize("x", CLEAN)
def test_it_is_the_published_score_entropy(x):
    """sigma' (sum s - r ln s(x) + r (ln r - 1)) of the scores that the prediction holds."""
    raw = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, prediction = terms(world("absorbing", "sedd"), raw, x)
    for row, t in enumerate(TIMES):
        alpha = kernel("absorbing", t)[0]
        r, rate = alpha / (1.0 - alpha), 1.0 / alpha  # sigma' of alpha = 1 - t
        score = prediction.log_score[row, list(CLEAN)]
        exact = rate * (score.exp().sum() - r * prediction.log_score[row, x] + r * (r.log() - 1.0))
        assert float(found[row]) == pytest.approx(float(exact), rel=1e-10)


MASKED = {
    "mdlm": {},
    "sedd": {},
    "d3pm": {"timesteps": 4},
    "ar": {"block_size": 1},
}


@pytest.mark.parametrize("kind", MASKED)
def test_masks_have_no_probability_and_their_logit_does_not_matter(kind):
    family = world("absorbing", kind, **MASKED[kind])
    t = torch.tensor([0.5], dtype=torch.float64)
    noise = noise_at(family, t, 1.0 - (t - 0.25) if kind == "d3pm" else None)
    raw = torch.randn(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x0, at, values = torch.tensor([CLEAN[0]]), torch.tensor([MASK]), []
    for mask, shift in ((-1e30, 0.0), (0.0, 0.0), (1e30, 0.0), (3.0, 11.0)):
        logits = (raw + shift)[None].clone()
        logits[0, MASK], logits[0, 4] = mask, torch.nan
        prediction = family.objective.predict(logits, at, noise.alpha)
        assert torch.equal(prediction.log_x0[0, [MASK, 4]].exp(), torch.zeros(2).double())
        values.append(float(family.objective.nelbo_terms(prediction, x0, at, noise)))
    assert values[0] == values[1] == values[2]
    moves = abs(values[3] - values[0])
    assert moves > 0.1 if kind == "sedd" else moves < 1e-10  # a score's total is said, not given


def test_the_mask_logit_of_plugged_posteriors_matters():
    family = world("absorbing", "d3pm", timesteps=4, parameterization="plugged")
    t = torch.tensor([0.5], dtype=torch.float64)
    noise = noise_at(family, t, 1.0 - (t - 0.25))
    values = []
    for mask in (-1e30, 0.0, 5.0):
        logits = torch.zeros(1, ROWS, dtype=torch.float64)
        logits[0, MASK] = mask
        at = torch.tensor([MASK])
        prediction = family.objective.predict(logits, at, noise.alpha)
        assert float(prediction.log_x0[0, MASK]) == -math.inf
        values.append(float(family.objective.nelbo_terms(prediction, torch.tensor([0]), at, noise)))
    assert values[0] < values[1] < values[2]
