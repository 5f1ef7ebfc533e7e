"""Guided distributions at one open place of three tokens, by the forward process's own matrices."""

import itertools

import pytest
import torch
from dense_tables import STATES, kernel, world
from exact_stats import chi_square_p
from exact_tables import CLEAN, MASK, ROWS
from rule_worlds import keyed, run
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.sampling.controls import Controls
from textdiff.sampling.guidance import GuidedPrediction
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.rules.first_hitting import FirstHitting
from textdiff.sampling.rules.predictor_corrector import PredictorCorrector
from textdiff.sampling.rules.scores import Tweedie

CLEAN_IDS = list(CLEAN)
OBJECTIVES = {"absorbing": "mdlm", "uniform": "udlm", "hybrid": "gidd"}


def on_clean(*chances: float) -> Tensor:
    p = torch.zeros(ROWS, dtype=torch.float64)
    p[CLEAN_IDS] = torch.tensor(chances, dtype=torch.float64)
    return p


TOLD, BLIND = on_clean(0.6, 0.3, 0.1), on_clean(0.3, 0.2, 0.5)


def tilted(told: Tensor, blind: Tensor, w: float) -> Tensor:
    """p_told ** (1 + w) / p_blind ** w, normalised; what is impossible in both stays so."""
    p = torch.where(blind > 0.0, told ** (1.0 + w) / blind**w, 0.0)
    return p / p.sum()


def posterior(process: str, p: Tensor, z: int, s: Tensor, t: Tensor) -> Tensor:
    """[ROWS] q(x_s | x_t = z, x_0 ~ p), p being plugged into Bayes' rule."""
    (alpha_s, at_s), (alpha_t, at_t) = kernel(process, s), kernel(process, t)
    ratio = alpha_t / alpha_s
    back = at_s @ p
    arrived = at_t[z, CLEAN[0] if z != CLEAN[0] else CLEAN[1]]  # noise that ends at z, at t
    before = at_s[z, CLEAN[0] if z != CLEAN[0] else CLEAN[1]]
    onward = torch.full_like(p, float(arrived - ratio * before))
    onward[z] += ratio
    return back * onward / (back * onward).sum()


def guided_law(process: str, w: float, steps: int, told=TOLD, blind=BLIND) -> Tensor:
    """[3] the law of the finished token: two posteriors mixed at each step down an even grid."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    law = kernel(process, times[0])[1][:, CLEAN[0]]
    for t, s in itertools.pairwise(times):
        following = torch.zeros_like(law)
        for z in (z for z in STATES[process] if law[z] > 0.0):
            if z == MASK:  # whether it is revealed is not guided, what it becomes is
                move = posterior(process, tilted(told, blind, w), z, s, t)
            else:
                move = tilted(*(posterior(process, p, z, s, t) for p in (told, blind)), w)
            following = following + law[z] * move
        law = following
    return law[CLEAN_IDS]


def drawn(rule, process: str, w: float, steps: int, rows: int = 20_000, controls=None, **more):
    """[3] how often each token is what a row of one place becomes."""
    family = world(process, more.get("objective", OBJECTIVES[process]))
    scored = family.objective.predicts_score

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> GuidedPrediction:
        xt = canvas.flatten()[positions.flat]
        alpha = family.schedule.alpha(t[positions.flat])
        parts = []
        for p in (TOLD, BLIND):
            log_x0 = p.log().expand(len(xt), -1)
            score = family.process.log_score(log_x0, xt, alpha) if scored else None
            parts.append(Prediction(log_x0, score))
        return GuidedPrediction.of(*parts, w)

    u = keyed(rows, 1, seed=7)
    start = family.process.prior((rows, 1), u(6, 0))
    last = run(
        rule,
        denoise,
        start,
        u,
        steps,
        family,
        controls=Controls() if controls is None else controls,
    )[-1]
    return torch.stack([(last.canvas == token).sum() for token in CLEAN])


def fit(found: Tensor, law: Tensor) -> float:
    """p-value of counts [3] under a law; what it excludes must not occur."""
    assert found[law == 0.0].sum() == 0
    found, law = found[law > 0.0], law[law > 0.0]
    return chi_square_p(found, law * found.sum())


@pytest.mark.parametrize("process", OBJECTIVES)
@pytest.mark.parametrize("w", [0.0, 1.5, -0.5])
def test_in_one_step_the_law_is_the_tilted_one(process, w):
    """In the limit of no steps between there is nothing but p(x | c)^(1 + w) / p(x)^w."""
    expected = tilted(TOLD, BLIND, w)[CLEAN_IDS]
    assert torch.allclose(guided_law(process, w, 1), expected, atol=1e-12)
    assert fit(drawn(Ancestral(), process, w, 1), expected) > 0.01


def test_one_by_one_the_law_is_the_tilted_one():
    expected = tilted(TOLD, BLIND, 2.0)[CLEAN_IDS]
    assert fit(drawn(FirstHitting(), "absorbing", 2.0, 1), expected) > 0.01


@pytest.mark.parametrize("process", ["uniform", "hybrid"])
def test_posteriors_are_mixed_step_by_step(process):
    expected = guided_law(process, 1.5, 4)
    found = drawn(Ancestral(), process, 1.5, 4)
    assert fit(found, expected) > 0.01
    if process == "uniform":  # which is not the posterior of any mixture of clean tokens
        mixture = tilted(TOLD, BLIND, 1.5)
        assert fit(found, guided_law(process, 0.0, 4, mixture, mixture)) < 1e-6


def test_scores_are_guided_alike():
    found = drawn(Tweedie(), "uniform", 1.5, 4, objective="sedd")
    assert fit(found, guided_law("uniform", 1.5, 4)) > 0.01


def test_a_corrector_without_redraws_is_guided_as_its_predictor():
    rule = PredictorCorrector(redraws=0.0)
    assert torch.equal(
        drawn(rule, "uniform", 1.5, 3, 2000), drawn(Ancestral(), "uniform", 1.5, 3, 2000)
    )


def test_controls_act_once_on_what_is_drawn():
    """Each side is multiplied by what the mixture is: at the ends it is that side, controlled."""
    controls = Controls(temperature=0.5, top_k=2)
    for w in (1.5, 0.0, -1.0):
        mixed = tilted(TOLD, BLIND, w)
        kept = mixed**2 * (mixed >= mixed.sort().values[-2])
        factor = torch.where(mixed > 0.0, kept / mixed, 0.0)
        told, blind = (p * factor / (p * factor).sum() for p in (TOLD, BLIND))
        expected = guided_law("uniform", w, 3, told, blind)
        found = drawn(Ancestral(), "uniform", w, 3, controls=controls)
        assert fit(found, expected) > 0.01


def test_the_likeliest_token_is_that_of_the_mixture():
    best = CLEAN.index(int(tilted(TOLD, BLIND, 1.0).argmax()))
    found = drawn(Ancestral(), "uniform", 1.0, 3, 200, controls=Controls(temperature=0.0))
    assert int(found[best]) == 200
