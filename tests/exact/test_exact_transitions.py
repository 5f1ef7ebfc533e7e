"""What is sampled is what is bounded: one step of a rule is the reverse transition in the bound.

For every objective, process and parametrisation the rule itself is run for one step from a given
token at given noise levels; the divergence of the true posterior from what it draws is the
objective's own term: exactly in T steps, and in the limit of small steps in continuous time.
"""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from dense_tables import STATES, K, drifting_logits, kernel, noise_at, sequences, world
from exact_stats import chi_square_p
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences, code
from refusals import refused
from test_exact_discrete_time import bound, onward
from torch import Tensor

import textdiff.sampling.draws as draws_module
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.diffusion.schedule import NoiseSchedule
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.segment import Segment

EVEN = 20_000  # uniforms that a probability is read off with


@dataclass(frozen=True)
class TwoSteps(NoiseSchedule):
    """A schedule whose first of two steps goes from alpha_t to alpha_s."""

    alpha_t: float
    alpha_s: float

    def alpha(self, t: Tensor) -> Tensor:
        early = self.alpha_t + (self.alpha_s - self.alpha_t) * 2.0 * (1.0 - t)
        late = self.alpha_s + (1.0 - self.alpha_s) * (1.0 - 2.0 * t)
        return torch.where(t >= 0.5, early, late)

    def dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -2.0 * (self.alpha_s - self.alpha_t))

    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        return 1.0 - 0.5 * (alpha - self.alpha_t) / (self.alpha_s - self.alpha_t)


def unchecked(weights: Tensor, u: Tensor) -> Tensor:
    return draws_module._column(weights, u)[0]


def transition(monkeypatch, family, name, logits, z, alpha_s, alpha_t, **knobs) -> Tensor:
    """[ROWS] distribution of x_s that a rule draws from, given x_t = z; by running the rule."""
    weights: list[Tensor] = []

    def recording(original):
        def draw(w, u):
            weights.append(w)
            return original(w, u)

        return draw

    monkeypatch.setattr(draws_module, "inverse_cdf", recording(unchecked))

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        alpha = torch.tensor([alpha_t], dtype=torch.float64).expand(len(positions))
        said = logits.expand(len(positions), -1)
        return family.objective.predict(said, canvas.flatten()[positions.flat], alpha)

    def revealed(low: float, high: float) -> Tensor:
        """[EVEN] bool: whether the first step moved z, by uniforms from `low` to `high`."""
        u = low + (high - low) * (torch.arange(EVEN, dtype=torch.float64)[:, None] + 0.5) / EVEN
        weights.clear()
        steps = build_rule(name, family, knobs)(
            Segment(
                denoise,
                family.process,
                TwoSteps(alpha_t, alpha_s),
                torch.full((EVEN, 1), z),
                steps=2,
                frozen=torch.zeros(EVEN, 1, dtype=torch.bool),
                uniforms=lambda stream, step: u,
                controls=Controls(),
            )
        )
        first = next(iter(steps))
        return (first.canvas[:, 0] != z) & (first.t == 1.0)

    by_weights = family.process.replaces_tokens or family.process.by_token
    moved = revealed(0.0, 1.0)
    if by_weights:
        return weights[0][0] / weights[0][0].sum()
    share = int(moved.sum())  # u below some level reveals; the level is in one of the cells
    near = revealed(max(0, share - 1) / EVEN, min(EVEN, share + 1) / EVEN)
    low, high = max(0, share - 1) / EVEN, min(EVEN, share + 1) / EVEN
    reveal = low + (high - low) * int(near.sum()) / EVEN
    found = reveal * (weights[0][0] / weights[0][0].sum())
    found[MASK] += 1.0 - reveal
    return found


def true_posterior(process: str, family, x: int, z: int, alpha_s: float, alpha_t: float) -> Tensor:
    """[ROWS] q(x_s | x_t = z, x_0 = x), written out."""
    law = torch.zeros(ROWS, dtype=torch.float64)
    for y in STATES[process]:
        shares = []
        for alpha in (alpha_s, alpha_t):
            m, b = family.process.shares(torch.tensor([alpha], dtype=torch.float64))
            shares.append((float(m), float(b)))
        (m_s, b_s), (m_t, b_t) = shares
        ratio = alpha_t / alpha_s
        at_s = alpha_s * (y == x) + (m_s if y == MASK else b_s)
        move = ratio * (y == z) + (m_t - ratio * m_s if z == MASK else b_t - ratio * b_s)
        law[y] = at_s * move
    return law / law.sum()


def divergence(q: Tensor, p: Tensor) -> float:
    return float((q * (q / p).log()).where(q > 0.0, 0.0).sum())


LOGITS = torch.tensor([[0.4, 0.9, -1.1, 0.7, 99.0]], dtype=torch.float64)  # the mask is second
CASES = {
    "mdlm": ("absorbing", "mdlm", "ancestral", {}),
    "d3pm-mixture": ("absorbing", "d3pm", "ancestral", {"parameterization": "mixture"}),
    "d3pm-plugged": ("absorbing", "d3pm", "ancestral", {"parameterization": "plugged"}),
    "d3pm-uniform-mixture": ("uniform", "d3pm", "ancestral", {"parameterization": "mixture"}),
    "d3pm-uniform-plugged": ("uniform", "d3pm", "ancestral", {"parameterization": "plugged"}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("step", [1, 3])
def test_in_steps_the_term_is_the_divergence_from_what_is_drawn(monkeypatch, name, step):
    process, kind, rule, options = CASES[name]
    timesteps = 5
    family = world(process, kind, timesteps=timesteps, **options)
    s, t = torch.tensor([step, step + 1], dtype=torch.float64) / timesteps
    alpha_s, alpha_t = family.schedule.alpha(s), family.schedule.alpha(t)
    noise = noise_at(family, t[None], alpha_s[None])
    for z in [MASK] if process == "absorbing" else CLEAN:
        drawn = transition(monkeypatch, family, rule, LOGITS, z, float(alpha_s), float(alpha_t))
        assert float(drawn[EXCLUDED]) == 0.0
        for x in CLEAN:
            at, x0 = torch.tensor([z]), torch.tensor([x])
            prediction = family.objective.predict(LOGITS, at, noise.alpha)
            nats = family.objective.nelbo_terms(prediction, x0, at, noise)
            q = true_posterior(process, family, x, z, float(alpha_s), float(alpha_t))
            assert timesteps * divergence(q, drawn) == pytest.approx(float(nats), rel=1e-5)


CONTINUOUS = {
    "mdlm": ("absorbing", "mdlm", "ancestral"),
    "sedd-tweedie": ("absorbing", "sedd", "tweedie"),
    "sedd-euler": ("absorbing", "sedd", "euler"),
    "sedd-uniform-tweedie": ("uniform", "sedd", "tweedie"),
    "sedd-uniform-euler": ("uniform", "sedd", "euler"),
    "udlm": ("uniform", "udlm", "ancestral"),
    "udlm-corrector": ("uniform", "udlm", "predictor_corrector"),
    "gidd": ("hybrid", "gidd", "ancestral"),
    "gidd-corrector": ("hybrid", "gidd", "predictor_corrector"),
}


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("t", [0.3, 0.7])
def test_in_continuous_time_it_is_the_limit_of_small_steps(monkeypatch, name, t):
    process, kind, rule = CONTINUOUS[name]
    family, h = world(process, kind), 1e-4
    times = torch.tensor([t - h, t], dtype=torch.float64)
    alpha_s, alpha_t = (float(a) for a in family.schedule.alpha(times))
    noise = noise_at(family, times[1:])
    knobs = {"redraws": 0.0} if rule == "predictor_corrector" else {}  # with them it corrects
    for z in [MASK] if process == "absorbing" else STATES[process]:
        drawn = transition(monkeypatch, family, rule, LOGITS, z, alpha_s, alpha_t, **knobs)
        for x in CLEAN:
            at, x0 = torch.tensor([z]), torch.tensor([x])
            prediction = family.objective.predict(LOGITS, at, noise.alpha)
            nats = float(family.objective.nelbo_terms(prediction, x0, at, noise))
            q = true_posterior(process, family, x, z, alpha_s, alpha_t)
            assert divergence(q, drawn) / h == pytest.approx(nats, rel=3e-3, abs=1e-3)


def test_with_learned_exponents_it_is_that_limit_too(monkeypatch):
    family, h, t = world("absorbing", "mdlm", schedule={"kind": "learned"}), 1e-4, 0.6
    exponents = torch.linspace(0.5, 2.0, ROWS, dtype=torch.float64)
    family.process.schedule._exponents = exponents
    drawn = transition(monkeypatch, family, "ancestral", LOGITS, MASK, 1.0 - t + h, 1.0 - t)
    noise = noise_at(family, torch.tensor([t], dtype=torch.float64))
    for x in CLEAN:
        stays = ((t - h) / t) ** float(exponents[x])
        q = torch.zeros(ROWS, dtype=torch.float64)
        q[x], q[MASK] = 1.0 - stays, stays
        at, x0 = torch.tensor([MASK]), torch.tensor([x])
        prediction = family.objective.predict(LOGITS, at, noise.alpha)
        nats = float(family.objective.nelbo_terms(prediction, x0, at, noise))
        assert divergence(q, drawn) / h == pytest.approx(nats, rel=3e-3)


def test_ancestral_sampling_of_scores_is_that_of_the_normalised_ones(monkeypatch):
    """Score entropy adds Z - 1 - ln Z to its cross-entropy: so it bounds these texts, too."""
    family, h, t = world("absorbing", "sedd"), 1e-4, 0.6
    drawn = transition(monkeypatch, family, "ancestral", LOGITS, MASK, 1.0 - t + h, 1.0 - t)
    noise = noise_at(family, torch.tensor([t], dtype=torch.float64))
    prediction = family.objective.predict(LOGITS, torch.tensor([MASK]), noise.alpha)
    for x in CLEAN:
        x0 = torch.tensor([x])
        nats = float(family.objective.nelbo_terms(prediction, x0, torch.tensor([MASK]), noise))
        q = true_posterior("absorbing", family, x, MASK, 1.0 - t + h, 1.0 - t)
        plain = float(-noise.weight * prediction.log_x0[0, x])
        assert divergence(q, drawn) / h == pytest.approx(plain, rel=3e-3)
        assert nats > plain + 0.01


def test_a_mask_is_kept_with_the_probability_in_the_bound(monkeypatch):
    """alpha 0.7 after 0.4, mask probability 0.3: 0.51 / 0.72."""
    family = world("absorbing", "d3pm", timesteps=10, parameterization="plugged")
    p = torch.zeros(ROWS, dtype=torch.float64)
    p[list(CLEAN)], p[MASK] = torch.tensor([0.35, 0.21, 0.14], dtype=torch.float64), 0.3
    drawn = transition(monkeypatch, family, "ancestral", p.log()[None], MASK, 0.7, 0.4)
    assert float(drawn[MASK]) == pytest.approx(0.51 / 0.72, abs=1e-8)
    assert drawn[list(CLEAN)].tolist() == pytest.approx([0.105 / 0.72, 0.063 / 0.72, 0.042 / 0.72])


def test_rules_that_reveal_masks_without_the_network_are_refused_where_it_predicts_them():
    family = world("absorbing", "d3pm", timesteps=10, parameterization="plugged")
    for name in ("first_hitting", "remask"):
        with refused(ConfigError, "unsuitable_rule", "the network predicts masks, too"):
            build_rule(name, family)


# --- texts ----------------------------------------------------------------------------------------

LENGTH, TIMESTEPS = 2, 3


def network(process: str, t: Tensor) -> Tensor:
    """[Q, S, L, ROWS] logits by noisy text, with time and with mass on the mask."""
    return drifting_logits(process, t, LENGTH)


def text_law(family, process: str) -> Tensor:
    """[9] distribution of the texts of T steps, by matrices; masks have to go at the last one."""
    z = sequences(process, LENGTH)
    at = {int(code(row)): i for i, row in enumerate(z)}
    plugged = family.objective.parameterization == "plugged"
    first = torch.tensor([MASK] * LENGTH) if process == "absorbing" else None
    law = torch.full((len(z),), K**-LENGTH, dtype=torch.float64)
    if first is not None:
        law = torch.zeros(len(z), dtype=torch.float64)
        law[at[int(code(first))]] = 1.0
    allowed = [*CLEAN, MASK] if process == "absorbing" and plugged else list(CLEAN)
    for step in reversed(range(TIMESTEPS)):
        s, t = torch.tensor([step, step + 1], dtype=torch.float64) / TIMESTEPS
        at_s, move = kernel(process, s)[1], onward(process, s, t)
        logits = network(process, t[None])[0]
        p = torch.zeros_like(logits)
        p[..., allowed] = logits[..., allowed].softmax(-1)
        each = torch.zeros_like(logits)  # [S, L, ROWS]
        for i, j in itertools.product(range(len(z)), range(LENGTH)):
            start = at_s @ p[i, j]
            start[MASK] += p[i, j, MASK]
            if plugged:
                back = start * move[z[i, j]]
                back = back / back.sum()
            else:
                back = torch.zeros(ROWS, dtype=torch.float64)
                for w in CLEAN:
                    one = at_s[:, w] * move[z[i, j]]
                    back += 0.0 if one.sum() == 0.0 else p[i, j, w] * one / one.sum()
            if process == "absorbing" and z[i, j] != MASK:
                back = torch.nn.functional.one_hot(z[i, j], ROWS).double()
            if step == 0:
                back[MASK] = 0.0
            each[i, j] = back / back.sum()
        law = law @ torch.stack([each[:, torch.arange(LENGTH), to].prod(-1) for to in z], 1)
    return torch.stack([law[at[int(code(x))]] for x in all_sequences(LENGTH)])


STEPPED = [name for name in CASES if name != "mdlm"]


@pytest.mark.parametrize("name", STEPPED)
def test_texts_are_at_least_as_likely_as_the_bound_says(name):
    """Enumerated laws; and the rule's own texts follow them."""
    process, kind, rule, options = CASES[name]
    family = world(process, kind, timesteps=TIMESTEPS, **options)
    law = text_law(family, process)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    for index, p in enumerate(law.tolist()):
        nats = bound(family, process, lambda t: network(process, t), index, LENGTH)
        assert math.log(p) >= -nats - 1e-9

    rows, z = 20_000, sequences(process, LENGTH)
    states = code(z)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        row = positions.row
        state = (code(canvas)[:, None] == states).long().argmax(1)[row]
        said = network(process, t[:1])[0][state, positions.column]
        alpha = family.schedule.alpha(t)[row]
        return family.objective.predict(said, canvas.flatten()[positions.flat], alpha)

    def draws(stream: Stream, step: int) -> Tensor:
        row = torch.arange(rows)[:, None]
        return uniforms(7, stream, row=row, step=step, position=torch.arange(LENGTH))

    if name == "d3pm-mixture":  # whose rows are at different steps in one call
        return
    steps = build_rule(rule, family)(
        Segment(
            denoise,
            family.process,
            family.schedule,
            family.process.prior((rows, LENGTH), draws(Stream.PRIOR, 0)),
            steps=TIMESTEPS,
            frozen=torch.zeros(rows, LENGTH, dtype=torch.bool),
            uniforms=draws,
            controls=Controls(),
        )
    )
    *_, last = steps
    counts = (code(last.canvas)[:, None] == code(all_sequences(LENGTH))).double().sum(0)
    assert chi_square_p(counts, rows * law) > 1e-3
