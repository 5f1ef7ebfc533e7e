"""Uniform and hybrid noise: boundary terms complete the bound by time, counts need none."""

import itertools
import math

import numpy as np
import pytest
import torch
from refusals import refused
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import ConfigError
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows

LENGTH = 4
COPIES = 1600


def dense_family(
    process: str, kind: str, schedule: dict, timesteps: int | None = None, **objective
) -> Family:
    spec = {
        "process": process,
        "schedule": schedule,
        "objective": {"kind": kind, **objective},
        "block_size": None,
        "timesteps": timesteps,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


LINEAR = {"kind": "loglinear"}
CHOICES = {
    "udlm": dense_family("uniform", "udlm", LINEAR),
    "sedd": dense_family("uniform", "sedd", LINEAR),
    "gidd": dense_family("hybrid", "gidd", {"kind": "hybrid", "uniform": 0.2}),
    "sedd-absorbing": dense_family("absorbing", "sedd", LINEAR),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def windows(family: Family, copies: int = COPIES, **options):
    generator = torch.Generator().manual_seed(1)
    text = torch.tensor(CLEAN)[torch.randint(len(CLEAN), (LENGTH,), generator=generator)]
    arrays = [text.to(torch.int32).numpy()] * copies
    return cut_windows(
        arrays, ["abcd"] * copies, LENGTH, family.process.vocabulary.clean, **options
    )


@pytest.mark.parametrize("name", CHOICES)
def test_times_with_both_ends_agree_with_counts(model, name):
    """Up to the one large step that replaces [0, eps]; without it they differ by far more."""
    chosen = CHOICES[name]
    eps = 0.02
    counts = estimate(model, chosen, windows(chosen), estimator="masked_count", seed=0).bound()
    times = estimate(model, chosen, windows(chosen), estimator="time", eps=eps, seed=0).bound()
    error = math.hypot(counts.stderr, times.stderr)
    assert abs(counts.mean - times.mean) < 4 * error + 0.01 * counts.mean
    assert times.terms["reconstruction"] > 0.0
    assert times.terms["prior"] == pytest.approx(0.0, abs=1e-12)
    assert times.is_bound


def test_a_prior_that_is_finite_is_added(model):
    chosen = dense_family("uniform", "udlm", {"kind": "loglinear", "eps": 0.1})
    bound = estimate(model, chosen, windows(chosen, 4), estimator="time", seed=0).bound()
    assert bound.terms["prior"] == pytest.approx(chosen.process.prior_kl(0.1), abs=1e-12)
    assert bound.terms["prior"] > 0.001
    assert bound.is_bound
    assert sum(bound.terms.values()) == pytest.approx(bound.mean, abs=1e-12)


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_models_in_steps_are_scored_in_steps(model, process):
    chosen = dense_family(process, "d3pm", LINEAR, timesteps=6)
    found = estimate(model, chosen, windows(chosen, 4), seed=0)
    assert found.estimator == "finite_t"
    assert found.bound().is_bound
    for name in ("masked_count", "time", "balanced"):
        with refused(ConfigError, "model_in_steps", "6 steps"):
            estimate(model, chosen, windows(chosen, 4), estimator=name, seed=0)


def test_steps_of_a_schedule_without_ideal_ends_have_all_three_terms(model):
    """One token under uniform noise, by matrices: steps, what is noisy at t = 0, what is left."""
    schedule = {"kind": "geometric", "sigma_min": 0.2, "sigma_max": 2.0}
    steps, size = 3, len(CLEAN)
    chosen = dense_family("uniform", "d3pm", schedule, timesteps=steps)
    x = 3
    alphas = [math.exp(-(0.2 ** (1 - i / steps)) * 2.0 ** (i / steps)) for i in range(steps + 1)]
    eye, even = torch.eye(size).double(), torch.full((size, size), 1.0 / size).double()

    def move(s: float, t: float) -> torch.Tensor:
        return t / s * eye + (1.0 - t / s) * even

    def said(alpha: float) -> torch.Tensor:
        """[z, x] p(x | z) of the network."""
        sigma = torch.full((size, 1), -math.log(alpha), dtype=torch.float32)
        with torch.no_grad():
            logits = model(torch.tensor(CLEAN)[:, None], sigma=sigma).logits[:, 0]
        return logits[:, list(CLEAN)].log_softmax(-1).exp()

    def back(s: float, t: float) -> torch.Tensor:
        """[z, w, y] q(x_s = y | x_t = z, x_0 = w)."""
        joint = move(s, t)[:, None, :] * move(1.0, s)[None, :, :]
        return joint / joint.sum(-1, keepdim=True)

    diffusion = 0.0
    for s, t in itertools.pairwise(alphas):
        q = back(s, t)
        p = (said(t)[:, :, None] * q).sum(1)
        kl = (q[:, x] * (q[:, x] / p).log()).sum(-1)
        diffusion += float((move(1.0, t)[x] * kl).sum())
    first, last = move(1.0, alphas[0])[x], move(1.0, alphas[-1])[x]
    reconstruction = -float((first * said(alphas[0])[:, x].log()).sum())
    prior = float((last * (last * size).log()).sum())

    array = np.array([CLEAN[x]], dtype=np.int32)
    clean = chosen.process.vocabulary.clean
    alone = cut_windows([array] * COPIES, ["a"] * COPIES, LENGTH, clean)
    parts = estimate(model, chosen, alone, seed=0).parts
    assert float(parts["prior"].mean()) == pytest.approx(prior, abs=1e-12)
    for name, exact in (("diffusion", diffusion), ("reconstruction", reconstruction)):
        nats = parts[name].flatten()
        stderr = float(nats.std()) / math.sqrt(len(nats))
        assert stderr < 0.05 * exact
        assert abs(float(nats.mean()) - exact) < 4 * stderr


@pytest.mark.parametrize("name", ["any_order", "importance", "chain_rule", "exact", "balanced"])
def test_orders_need_absorbing_noise(name):
    chosen = CHOICES["udlm"]
    with refused(ConfigError, "not_absorbing", "uniform noise"):
        estimate(tiny_model(), chosen, windows(chosen, 4), estimator=name, seed=0)


@pytest.mark.parametrize("name", ["masked_count", "time"])
@pytest.mark.parametrize("choice", ["udlm", "gidd"])
def test_context_stays_clean_and_free_under_dense_noise(model, name, choice, monkeypatch):
    chosen = CHOICES[choice]
    given = torch.tensor([True, False, False, True])
    cut = windows(chosen, 20, scored=[~given.numpy()] * 20)
    original = torch.from_numpy(cut.tokens[0])
    seen, hidden = [], model.hidden

    def watching(tokens, *rest):
        seen.append(bool((tokens[:, given] == original[given]).all()))
        return hidden(tokens, *rest)

    monkeypatch.setattr(model, "hidden", watching)
    found = estimate(model, chosen, cut, estimator=name, seed=0, attribute=True)
    assert seen
    assert all(seen)
    assert all(bool((nats[given] == 0).all()) for nats in found.token_nats())
    assert found.bound().tokens == 40
