"""Identity 13: the bound of masks and uniform noise at once."""

import math
from dataclasses import replace

import pytest
import torch
from dense_tables import UNIFORM, K, drifting_logits, kernel, nelbo, noise_at, oracle, world
from exact_tables import CLEAN, MASK, ROWS, random_joint
from test_exact_uniform import found, point, random_x0

from textdiff.diffusion.schedule import HybridSchedule

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
PAIRS = [(x, z) for x in CLEAN for z in (*CLEAN, MASK)]


def posterior(p, z: int, s, t):
    """[ROWS] Bayes' rule with matrices: Q_{t|s} = Q_t Q_s^-1 on the four states."""
    at = list((*CLEAN, MASK))
    whole = []
    for time in (s, t):
        _, matrix = kernel("hybrid", time)
        matrix[MASK, MASK] = 1.0
        alpha = float(kernel("hybrid", time)[0])
        # A mask at the start: the same rates lead from it to the same noise.
        for token in CLEAN:
            other = next(x for x in CLEAN if x != token)
            matrix[token, MASK] = matrix[token, other]
        matrix[MASK, MASK] = alpha + matrix[MASK, CLEAN[0]]
        whole.append(matrix[at][:, at])
    move = whole[1] @ torch.linalg.inv(whole[0])
    back = torch.zeros(ROWS, dtype=torch.float64)
    back[at] = (whole[0] @ p[at]) * move[at.index(z)]
    return back / back.sum()


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_gidd_is_the_rate_of_the_divergence_of_one_small_step(x, z):
    p, h = random_x0(), 1e-6
    for t, value in zip(TIMES, found(world("hybrid", "gidd"), p, x, z, TIMES), strict=True):
        q, model = posterior(point(x), z, t - h, t), posterior(p, z, t - h, t)
        kl = (q * (q / model).log()).nan_to_num(0.0).sum() / h
        assert float(value) == pytest.approx(float(kl), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("x", "z"), PAIRS)
def test_gidd_is_its_published_weights_and_divergences(x, z):
    """Eq. 11 of arXiv:2503.04482 with g = 1."""
    p, scale = random_x0(), 2.0 * UNIFORM / (1.0 - UNIFORM)
    for t, value in zip(TIMES, found(world("hybrid", "gidd"), p, x, z, TIMES), strict=True):
        c = scale * (t * (1.0 - t)).sqrt()
        gain = c + (1.0 - t) * scale * (1.0 - 2.0 * t) / (2.0 * (t * (1.0 - t)).sqrt())
        weight = {
            MASK: 1.0 / (t * (1.0 - t)),
            x: gain / K / ((1.0 - t) * (1.0 - t + c / K)),
        }.get(z, gain / ((1.0 - t) * c))
        q, model = kernel("hybrid", t)[1] @ point(x), kernel("hybrid", t)[1] @ p
        r = q[z] / model[z]
        kl = (q * (q / model).log()).nan_to_num(0.0).sum()
        exact = weight * (kl + r - r.log() - 1.0)
        assert float(value) == pytest.approx(float(exact), rel=1e-9, abs=1e-9)


def test_without_uniform_noise_it_is_masked_diffusion():
    p = random_x0()
    for share, tolerance in ((0.0, 1e-10), (1e-9, 1e-3)):
        schedule = HybridSchedule.model_construct(uniform=share)  # a config has more than 0
        family = world("hybrid", "gidd")
        process = replace(family.process, schedule=schedule)
        family = replace(
            family, process=process, schedule=schedule, objective=family.objective.on(process)
        )
        for x in CLEAN:
            masked = found(family, p, x, MASK, TIMES)
            assert (masked * TIMES + p[x].log()).abs().max() < tolerance
            assert found(family, p, x, x, TIMES).abs().max() < tolerance


def test_leave_one_out_oracle_has_the_likelihood():
    joint = random_joint(3, 2)
    family = world("hybrid", "gidd")
    for index in range(0, len(joint), 2):
        value = nelbo(family, "hybrid", lambda t: oracle("hybrid", joint, t, 2, True), index, 90)
        assert value == pytest.approx(-math.log(joint[index]), abs=1e-6)


def test_arbitrary_networks_cost_more_on_average_than_the_truth():
    joint = random_joint(3, 2)
    family = world("hybrid", "gidd")
    networks = [
        lambda t: drifting_logits("hybrid", t, 2),
        lambda t: oracle("hybrid", joint, t, 2, False),  # the optimum leaves the position out
    ]
    for network in networks:
        values = [nelbo(family, "hybrid", network, index) for index in range(9)]
        gap = sum(float(p) * (v + math.log(p)) for p, v in zip(joint, values, strict=True))
        assert gap > 0.05


@pytest.mark.parametrize("weight", ["clipped", "dynamic", "released"])
def test_training_weights_are_the_stated_ones_and_leave_the_bound_alone(weight):
    p, scale = random_x0(), 2.0 * UNIFORM / (1.0 - UNIFORM)
    plain, family = world("hybrid", "gidd"), world("hybrid", "gidd", loss_weight=weight)
    for x, z in PAIRS:
        nelbo_terms = found(plain, p, x, z, TIMES)
        assert torch.equal(found(family, p, x, z, TIMES), nelbo_terms)
        noise, at = noise_at(family, TIMES), torch.full((len(TIMES),), z)
        x0 = torch.full_like(at, x)
        prediction = family.objective.predict(p.log().expand(len(TIMES), -1), at, noise.alpha)
        loss = family.objective.loss_terms(nelbo_terms, prediction, x0, at, noise)
        for t, value, bound in zip(TIMES, loss, nelbo_terms, strict=True):
            q, model = kernel("hybrid", t)[1] @ point(x), kernel("hybrid", t)[1] @ p
            r = q[z] / model[z]
            pure = (q * (q / model).log()).nan_to_num(0.0).sum() + r - r.log() - 1.0
            if weight == "clipped":
                wanted = min(2.0, float(bound / pure))
            else:
                uniform = scale / K * (t / (1.0 - t)).sqrt()
                if weight == "released":
                    uniform = scale / (K + 1) * math.exp(1.0 / (1.0 + math.exp(t)) / 2.0)
                wanted = {MASK: 2.0, x: float(uniform)}.get(z, 1.0)
            assert float(value) == pytest.approx(wanted * float(pure), rel=1e-8, abs=1e-10)
