"""Identities 5, 6 and 12: T steps cost the divergences of exact posteriors, by brute force."""

import itertools
import math

import pytest
import torch
from dense_tables import (
    STATES,
    K,
    drifting_logits,
    expected,
    kernel,
    noise_at,
    oracle,
    position_nats,
    world,
)
from exact_tables import CLEAN, MASK, ROWS, all_sequences, random_joint
from test_exact_uniform import point, random_x0
from torch import Tensor

PROCESSES = ["absorbing", "uniform"]


def onward(process: str, s: Tensor, t: Tensor) -> Tensor:
    """[ROWS, ROWS] q(x_t = row | x_s = column)."""
    ratio = kernel(process, t)[0] / kernel(process, s)[0]
    move = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    for y in STATES[process]:
        move[y, y] += ratio
        if process == "absorbing":
            move[MASK, y] += 1.0 - ratio
        else:
            move[list(CLEAN), y] += (1.0 - ratio) / K
    return move


def step_kl(process: str, p: Tensor, x: int, z: int, s: Tensor, t: Tensor, mixture: bool) -> float:
    """KL(q(x_s | z, x) || p(x_s | z)), every posterior normalised by hand."""

    def bayes(start: Tensor) -> Tensor:
        back = start * onward(process, s, t)[z]
        return back / back.sum()

    at_s = kernel(process, s)[1]
    if mixture:
        model = sum(p[w] * bayes(at_s @ point(w)) for w in CLEAN)
    else:
        start = at_s @ p
        start[MASK] += p[MASK]  # a clean token that is the mask stays one
        model = bayes(start)
    q = bayes(at_s @ point(x))
    return float((q * (q / model).log()).nan_to_num(0.0).sum())


@pytest.mark.parametrize("mixture", [True, False], ids=["mixture", "plugged"])
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("timesteps", [1, 2, 7])
def test_every_step_is_the_brute_force_divergence(process, mixture, timesteps):
    kind = "mixture" if mixture else "plugged"
    family = world(process, "d3pm", timesteps=timesteps, parameterization=kind)
    p = random_x0()
    if process == "absorbing" and not mixture:
        p[MASK] = 0.4
        p = p / p.sum()
    for step in range(timesteps):
        s, t = torch.tensor([step, step + 1], dtype=torch.float64) / timesteps
        noise = noise_at(family, t[None], family.schedule.alpha(s)[None])
        for x in CLEAN:
            for z in [MASK] if process == "absorbing" else CLEAN:
                at, x0 = torch.tensor([z]), torch.tensor([x])
                logits = (p.log() + 2.0)[None].clone()
                logits[:, 4] = torch.nan
                if process == "uniform" or mixture:
                    logits[:, MASK] = 50.0  # never read
                prediction = family.objective.predict(logits, at, noise.alpha)
                nats = family.objective.nelbo_terms(prediction, x0, at, noise)
                exact = timesteps * step_kl(process, p, x, z, s, t, mixture)
                assert float(nats) == pytest.approx(exact, rel=1e-9, abs=1e-9)


def test_absorbing_without_mass_on_the_mask_is_weighted_cross_entropy():
    """(alpha_s - alpha_t) / (1 - alpha_t) CE for both readings, and for mdlm in steps."""
    p, timesteps = random_x0(), 5
    logits = p.log()[None].clone()
    families = [
        world("absorbing", "d3pm", timesteps=timesteps),
        world("absorbing", "d3pm", timesteps=timesteps, parameterization="plugged"),
        world("absorbing", "mdlm", timesteps=timesteps),
    ]
    for step in range(timesteps):
        s, t = torch.tensor([step, step + 1], dtype=torch.float64) / timesteps
        for family in families:
            noise = noise_at(family, t[None], family.schedule.alpha(s)[None])
            at, x0 = torch.tensor([MASK]), torch.tensor([CLEAN[1]])
            prediction = family.objective.predict(logits, at, noise.alpha)
            nats = family.objective.nelbo_terms(prediction, x0, at, noise)
            exact = -timesteps * float((t - s) / t * p[CLEAN[1]].log())
            assert float(nats) == pytest.approx(exact, abs=1e-11)


def bound(family, process: str, network, index: int, length: int) -> float:
    """The T-step bound of one text, every step and every noisy sequence enumerated."""
    timesteps = family.timesteps
    t = (torch.arange(timesteps, dtype=torch.float64) + 1.0) / timesteps
    x = all_sequences(length)[index]
    terms = position_nats(family, network(t), t, x, process)
    return float(expected(process, t, terms, index).mean())


def oracle_gap(process: str, timesteps: int, leave_out: bool, kind: str) -> float:
    """Mean over texts of the bound minus -ln P; the priors at t = 1 are the same."""
    joint, length = random_joint(3, 2), 2
    family = world(process, "d3pm", timesteps=timesteps, parameterization=kind)
    gap = 0.0
    for index, p in enumerate(joint.tolist()):
        nats = bound(
            family, process, lambda t: oracle(process, joint, t, length, leave_out), index, length
        )
        gap += p * (nats + math.log(p))
    return gap


@pytest.mark.parametrize(
    ("process", "leave_out", "kind"),
    [
        ("absorbing", False, "mixture"),
        ("uniform", False, "mixture"),
        ("uniform", True, "plugged"),
    ],
)
def test_gap_of_the_right_oracle_vanishes_like_one_over_the_steps(process, leave_out, kind):
    gaps = [oracle_gap(process, timesteps, leave_out, kind) for timesteps in (1, 8, 16, 32, 64)]
    assert all(gap > 0.0 for gap in gaps)
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(gaps[1:])]
    assert all(1.6 < ratio < 2.1 for ratio in ratios)
    assert gaps[-1] < 0.03


@pytest.mark.parametrize(("leave_out", "kind"), [(True, "mixture"), (False, "plugged")])
def test_gap_of_the_wrong_oracle_does_not_vanish(leave_out, kind):
    assert oracle_gap("uniform", 64, leave_out, kind) > 0.05


@pytest.mark.parametrize("process", PROCESSES)
def test_one_step_is_the_product_of_what_is_said_about_pure_noise(process):
    """T = 1: x_1 does not know x_0, and the only term is -ln p(x_0 | x_1)."""
    family = world(process, "d3pm", timesteps=1)

    def network(t: Tensor) -> Tensor:
        return drifting_logits(process, t, 2)

    logits = network(torch.ones(1, dtype=torch.float64))[0]
    log_p = logits[..., list(CLEAN)].log_softmax(-1)
    for index, x in enumerate(all_sequences(2)):
        columns = [CLEAN.index(token) for token in x.tolist()]
        said = -log_p[:, torch.arange(2), columns].sum(-1)  # [S]
        exact = said[-1] if process == "absorbing" else said.mean()
        assert bound(family, process, network, index, 2) == pytest.approx(float(exact), abs=1e-10)


def test_the_auxiliary_cross_entropy_is_training_only():
    for process in PROCESSES:
        plain = world(process, "d3pm", timesteps=4)
        family = world(process, "d3pm", timesteps=4, auxiliary=0.25)
        p, z = random_x0(), MASK if process == "absorbing" else CLEAN[0]
        t = torch.tensor([0.5], dtype=torch.float64)
        noise = noise_at(family, t, plain.schedule.alpha(t - 0.25))
        x0, at = torch.tensor([CLEAN[1]]), torch.tensor([z])
        prediction = family.objective.predict(p.log()[None], at, noise.alpha)
        nats = family.objective.nelbo_terms(prediction, x0, at, noise)
        assert torch.equal(nats, plain.objective.nelbo_terms(prediction, x0, at, noise))
        loss = family.objective.loss_terms(nats, prediction, x0, at, noise)
        assert float(loss - nats) == pytest.approx(-0.25 * math.log(p[CLEAN[1]]), abs=1e-12)
