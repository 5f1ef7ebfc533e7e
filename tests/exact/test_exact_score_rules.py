"""Euler's and Tweedie's steps with true scores: enumerated laws, samples, limits."""

import itertools

import pytest
import torch
from dense_tables import kernel, likelihoods, sequences, world
from exact_stats import chi_square_p
from exact_tables import (
    CLEAN,
    EXCLUDED,
    MASK,
    ROWS,
    all_sequences,
    ancestral_law,
    code,
    family,
    random_joint,
)
from refusals import refused
from rule_worlds import conditionals, keyed, reader, run, total_variation, truth
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.rules.ancestral import Ancestral

K = len(CLEAN)
KINDS = ["loglinear", "cosine", "polynomial"]


def absorbing(kind: str):
    return family(schedule={"kind": kind}) if kind else family()


def score_family(process: str, schedule: dict | None = None):
    return world(process, "sedd", schedule=schedule)


def score_reader(table, schedule, mass: float = 1.0):
    """The score of a table's conditionals; sums to `mass` times what it should."""
    ask = reader(table)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        log_x0 = ask(canvas, t, positions).log_x0
        alpha = schedule.alpha(t[positions.row]).clamp(min=1e-3)[:, None]
        return Prediction(log_x0, log_x0 + (mass * alpha / (1.0 - alpha)).log())

    return denoise


# --- absorbing ------------------------------------------------------------------------------------


def reveal_law(name: str, schedule, steps: int, mass: float = 1.0) -> Tensor:
    """[T] the share of masks revealed at each step, written out; shorter where all are early."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    still, law = 1.0, []
    for j, (t, s) in enumerate(itertools.pairwise(times)):
        alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
        if j == steps - 1:
            chance = 1.0
        elif alpha_t == 0.0:
            chance = float(alpha_s)
        elif name == "tweedie":
            chance = float((alpha_s - alpha_t) / (1.0 - alpha_t)) * mass
        else:  # -alpha' (t - s) / (1 - alpha)
            chance = float(-schedule.dalpha(t) * (t - s) / (1.0 - alpha_t)) * mass
        chance = min(1.0, chance)
        law.append(still * chance)
        still *= 1.0 - chance
        if still == 0.0:
            break
    return torch.tensor(law, dtype=torch.float64)


@pytest.mark.parametrize("name", ["euler", "tweedie"])
@pytest.mark.parametrize("kind", KINDS)
def test_absorbing_distance_to_the_truth_falls_as_steps_double(name, kind):
    joint = random_joint(3)
    table = conditionals(joint, 3)
    schedule = absorbing(kind).schedule
    laws = [ancestral_law(table, reveal_law(name, schedule, 2**p)) for p in range(2, 9)]
    distances = [total_variation(law, joint) for law in laws]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.2 for ratio in ratios)
    assert ratios[-1] > 1.6
    assert distances[-1] < 0.02


@pytest.mark.parametrize("mass", [1.0, 0.6])
@pytest.mark.parametrize("name", ["euler", "tweedie"])
@pytest.mark.parametrize("kind", ["loglinear", "cosine"])
def test_absorbing_samples_follow_the_enumerated_law(name, kind, mass):
    """Also with scores that add up to less than they should: fewer masks are revealed early."""
    joint, rows, steps = random_joint(3), 20_000, 4
    table = conditionals(joint, 3)
    chosen = score_family("absorbing", {"kind": kind})
    law = ancestral_law(table, reveal_law(name, chosen.schedule, steps, mass))
    canvas = torch.full((rows, 3), MASK)
    rule = build_rule(name, chosen)
    denoise = score_reader(table, chosen.schedule, mass)
    walk = run(rule, denoise, canvas, keyed(rows, 3), steps, chosen)
    assert len(walk) == steps
    counts = (code(walk[-1].canvas)[:, None] == code(all_sequences())).double().sum(0)
    assert chi_square_p(counts, rows * law) > 1e-3
    other = ancestral_law(table, reveal_law(name, chosen.schedule, 2, mass))
    assert chi_square_p(counts, rows * other) < 1e-6


def test_tweedie_reveals_when_ancestral_sampling_does():
    """With scores of distributions the chances are the same (Sec. 3, arXiv:2406.03736)."""
    _, table = truth()
    chosen, rows, steps = score_family("absorbing", {"kind": "cosine"}), 20_000, 5
    canvas = torch.full((rows, 4), MASK)
    denoise = score_reader(table, chosen.schedule)
    shares = []
    for rule in (build_rule("tweedie", chosen), Ancestral()):
        walk = run(rule, denoise, canvas, keyed(rows, 4), steps, chosen)
        when = torch.stack([step.t for step in walk]).unique().flip(0)
        share = [
            sum(int((step.t[step.changed // 4] == t).sum()) for step in walk if len(step.changed))
            for t in when
            if t > 0
        ]
        shares.append(torch.tensor(share[:steps], dtype=torch.float64) / (4 * rows))
    assert (shares[0] - shares[1]).abs().max() < 4 * 0.5 / (4 * rows) ** 0.5 * 2


@pytest.mark.parametrize("name", ["euler", "tweedie"])
def test_the_last_step_reveals_what_is_left_greedily_if_so_asked(name):
    """Scores next to nothing: all is left for it but what the first step reveals."""
    _, table = truth()
    chosen = score_family("absorbing")
    denoise = score_reader(table, chosen.schedule, 1e-9)
    rule = build_rule(name, chosen, {"greedy_tail": True})
    walk = run(rule, denoise, torch.full((50, 4), MASK), keyed(50, 4), 3, chosen)
    hidden = walk[-2].canvas
    assert (hidden == MASK).sum() > 50
    best = table.log_p[code(hidden)].argmax(-1)
    assert torch.equal(walk[-1].canvas, torch.where(hidden == MASK, best, hidden))


def test_a_score_without_sum_still_leaves_no_mask():
    _, table = truth()
    chosen = score_family("absorbing")
    for name in ("euler", "tweedie"):
        for mass in (1e-9, 1e9):
            denoise = score_reader(table, chosen.schedule, mass)
            canvas = torch.full((50, 4), MASK)
            walk = run(build_rule(name, chosen), denoise, canvas, keyed(50, 4), 4, chosen)
            assert torch.isin(walk[-1].canvas, torch.tensor(CLEAN)).all()
            assert len(walk) == (4 if mass < 1.0 else 2)


# --- uniform --------------------------------------------------------------------------------------

LENGTH = 2


def true_scores(joint: Tensor, t: Tensor) -> Tensor:
    """[S, L, ROWS] log q_t(z with z_i = y) - log q_t(z), from the joint law of noisy texts."""
    z = sequences("uniform", LENGTH)
    q = (likelihoods("uniform", t[None], LENGTH)[0].prod(-1) * joint).sum(-1)
    at = {int(code(row)): float(p) for row, p in zip(z, q, strict=True)}
    scores = torch.zeros(len(z), LENGTH, ROWS, dtype=torch.float64)
    for row, i, y in itertools.product(range(len(z)), range(LENGTH), CLEAN):
        other = z[row].clone()
        other[i] = y
        scores[row, i, y] = at[int(code(other))] / at[int(code(z[row]))]
    return scores.log()


def uniform_law(name: str, joint: Tensor, steps: int, taken: int | None = None) -> Tensor:
    """[9] the law after all or some of `steps` steps, by matrices that the library never sees."""
    z = sequences("uniform", LENGTH)
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    law = torch.full((len(z),), K**-LENGTH, dtype=torch.float64)
    for j, (t, s) in list(enumerate(itertools.pairwise(times)))[:taken]:
        # Where nothing survives, from just below t = 1: scores of 1 say nothing.
        at = t.clamp(max=1.0 - 1e-9)
        score = true_scores(joint, at).exp()
        (alpha_t,), (alpha_s,) = kernel("uniform", at[None])[0], kernel("uniform", s[None])[0]
        if name == "tweedie" or j in (0, steps - 1):
            ratio = alpha_t / alpha_s
            matrix = torch.zeros(ROWS, ROWS, dtype=torch.float64)
            matrix[list(CLEAN), :] = torch.eye(ROWS, dtype=torch.float64)[list(CLEAN)] * ratio
            for x, y in itertools.product(CLEAN, CLEAN):
                matrix[y, x] += (1.0 - ratio) / K
            states = matrix[list(CLEAN)][:, list(CLEAN)]
            back = torch.zeros_like(score)
            back[..., list(CLEAN)] = score[..., list(CLEAN)] @ torch.linalg.inv(states)
            move = back * matrix[z]  # [S, L, ROWS], matrix symmetric
        else:
            noise = float(t - s) / float(alpha_t)  # sigma' = 1 / alpha for alpha = 1 - t
            move = noise * score / K
            move.scatter_(-1, z[..., None], 0.0)
            move.scatter_(-1, z[..., None], 1.0 - move.sum(-1, keepdim=True))
        move = move.clamp(min=0.0)
        move = move / move.sum(-1, keepdim=True)
        step = torch.stack([move[:, torch.arange(LENGTH), to].prod(-1) for to in z], 1)
        law = law @ step
    found = {int(code(row)): float(p) for row, p in zip(z, law, strict=True)}
    texts = all_sequences(LENGTH)
    return torch.tensor([found[int(code(x))] for x in texts], dtype=torch.float64)


def uniform_walk(name: str, joint: Tensor, steps: int, rows: int, chosen, **rest):
    lookup = code(sequences("uniform", LENGTH))

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        scores = true_scores(joint, t[0].clamp(max=1.0 - 1e-3))  # as networks are told
        state = (code(canvas)[:, None] == lookup).long().argmax(1)
        log_score = scores[state].flatten(0, 1)[positions.flat]
        alpha = chosen.schedule.alpha(t[0].clamp(max=1.0 - 1e-3)).expand(len(positions))
        before = canvas.flatten()[positions.flat]
        return Prediction(lambda: chosen.process.log_x0(log_score, before, alpha), log_score)

    draws = keyed(rows, LENGTH, seed=steps)
    canvas = chosen.process.prior((rows, LENGTH), keyed(rows, LENGTH, seed=99)(4, 0))
    return run(build_rule(name, chosen), denoise, canvas, draws, steps, chosen, **rest)


@pytest.mark.parametrize("name", ["euler", "tweedie"])
def test_uniform_distance_to_the_truth_falls_as_steps_double(name):
    joint = random_joint(3, LENGTH)
    laws = [uniform_law(name, joint, steps) for steps in (4, 8, 16, 32, 64, 128)]
    assert all(float(law.sum()) == pytest.approx(1.0, abs=1e-9) for law in laws)
    distances = [total_variation(law, joint) for law in laws]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.3 for ratio in ratios)
    assert distances[-1] < 0.03


@pytest.mark.parametrize("name", ["euler", "tweedie"])
def test_uniform_samples_follow_the_enumerated_law_after_every_step(name):
    joint, rows, steps = random_joint(3, LENGTH), 20_000, 3
    walk = uniform_walk(name, joint, steps, rows, score_family("uniform"))
    other = "tweedie" if name == "euler" else "euler"
    for taken, step in enumerate(walk, 1):
        assert not torch.isin(step.canvas, torch.tensor([MASK, EXCLUDED])).any()
        counts = (code(step.canvas)[:, None] == code(all_sequences(LENGTH))).double().sum(0)
        assert chi_square_p(counts, rows * uniform_law(name, joint, steps, taken)) > 1e-3
        if taken == steps - 1:
            assert chi_square_p(counts, rows * uniform_law(other, joint, steps, taken)) < 1e-6


def test_controls_act_on_the_clean_tokens_behind_the_score():
    joint, chosen = random_joint(3, LENGTH), score_family("uniform")
    cold = uniform_walk("tweedie", joint, 6, 300, chosen, controls=Controls(temperature=0.0))
    free = uniform_walk("tweedie", joint, 6, 300, chosen)
    assert len(code(cold[-1].canvas).unique()) < len(code(free[-1].canvas).unique())


def test_greedy_tail_takes_the_likeliest_tokens_at_the_last_step():
    joint, chosen = random_joint(3, LENGTH), score_family("uniform")
    rows, steps = 500, 3
    lookup = code(sequences("uniform", LENGTH))
    t = torch.tensor(1.0 / steps, dtype=torch.float64)
    scores, alpha = true_scores(joint, t), chosen.schedule.alpha(t)
    flat = scores.flatten(0, 1)
    z = sequences("uniform", LENGTH).flatten()
    best = chosen.process.log_x0(flat, z, alpha.expand(len(z))).argmax(-1).view(-1, LENGTH)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        now = true_scores(joint, t[0].clamp(max=1.0 - 1e-3))
        state = (code(canvas)[:, None] == lookup).long().argmax(1)
        log_score = now[state].flatten(0, 1)[positions.flat]
        level = chosen.schedule.alpha(t[0].clamp(max=1.0 - 1e-3)).expand(len(positions))
        before = canvas.flatten()[positions.flat]
        return Prediction(lambda: chosen.process.log_x0(log_score, before, level), log_score)

    canvas = chosen.process.prior((rows, LENGTH), keyed(rows, LENGTH, seed=99)(4, 0))
    for name in ("euler", "tweedie"):
        rule = build_rule(name, chosen, {"greedy_tail": True})
        walk = run(rule, denoise, canvas, keyed(rows, LENGTH), steps, chosen)
        state = (code(walk[-2].canvas)[:, None] == lookup).long().argmax(1)
        assert torch.equal(walk[-1].canvas, best[state])


def test_rules_along_scores_need_a_network_that_predicts_them():
    for name in ("euler", "tweedie"):
        for chosen in (family(), world("uniform", "udlm")):
            with pytest.raises(ConfigError, match=f"{name} follows scores, which this obj"):
                build_rule(name, chosen)
        with refused(ConfigError, "unsuitable_rule", "noise here is hybrid"):
            build_rule(name, world("hybrid", "gidd"))


def test_a_banned_token_has_no_chance_from_rounding():
    """Under uniform noise the last step subtracts; what is left of nothing is a rounding error."""
    chosen, rows = world("uniform", "sedd"), 400
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(rows, ROWS, generator=generator, dtype=torch.float64)
    log_x0 = raw.masked_fill(~chosen.process.vocabulary.clean, -torch.inf).log_softmax(-1)

    def denoise(canvas, t, positions):
        xt, alpha = canvas.flatten()[positions.flat], chosen.schedule.alpha(t[positions.flat])
        score = chosen.process.log_score(log_x0[positions.flat], xt, alpha)
        return Prediction(log_x0[positions.flat], score)

    def least(stream, step):  # draws the first token that has any weight
        return torch.full((rows, 1), 1e-300, dtype=torch.float64)

    start = torch.full((rows, 1), CLEAN[1])
    controls = Controls(banned=(CLEAN[0],))
    for name in ("euler", "tweedie"):
        rule = build_rule(name, chosen)
        last = run(rule, denoise, start, least, 3, chosen, controls=controls)[-1]
        assert (last.canvas == CLEAN[1]).all()
