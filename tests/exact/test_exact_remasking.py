"""Remasking and predictor-corrector: laws by enumeration, samples, and where they are exact."""

import itertools
import math

import pytest
import torch
from dense_tables import kernel, oracle, sequences, world
from exact_stats import chi_square_p
from exact_tables import CLEAN, EXCLUDED, MASK, ROWS, all_sequences, code, family, random_joint
from refusals import refused
from rule_worlds import conditionals, keyed, reader, run, total_variation
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.rules.remask import largest_share, sigma_max

LENGTH = 2


def texts_of(canvas: Tensor) -> Tensor:
    """[9] how many rows hold each clean text; anything else is an error."""
    assert not torch.isin(canvas, torch.tensor([MASK, EXCLUDED])).any()
    return (code(canvas)[:, None] == code(all_sequences(LENGTH))).double().sum(0)


# --- remasking ------------------------------------------------------------------------------------


def loop_alpha(t: float) -> float:
    """0 to 0.9 between t = 1 and 0.55, held until 0.05, then up to 1."""
    if t > 0.55:
        return 0.9 * (1.0 - t) / 0.45
    return 0.9 if t >= 0.05 else 1.0 - 0.1 * t / 0.05


def remask_law(strategy: str, eta: float, joint: Tensor, steps: int) -> dict[tuple, float]:
    """The law of (token, its probability when revealed) per position, walked state by state."""
    table = conditionals(joint, LENGTH)
    level = loop_alpha if strategy == "loop" else lambda t: 1.0 - t
    states = {((MASK, 0.0),) * LENGTH: 1.0}
    for j in range(steps):
        t, s = 1.0 - j / steps, 1.0 - (j + 1) / steps
        alpha_t, alpha_s = level(t), 1.0 if j == steps - 1 else level(s)
        most = min(1.0, (1.0 - alpha_s) / alpha_t) if alpha_t else 1.0
        following: dict[tuple, float] = {}
        for state, weight in states.items():
            p = table.log_p[code(torch.tensor([x for x, _ in state]))].exp().tolist()
            seen = [math.exp(-c) for x, c in state if x != MASK]
            moves = []
            for i, (x, c) in enumerate(state):
                sigma = {
                    "cap": min(eta, most),
                    "rescale": eta * most,
                    "conf": 0.0 if x == MASK else eta * most * math.exp(-c) / sum(seen),
                    "loop": min(eta, most) if abs(alpha_t - alpha_s) < 1e-12 else 0.0,
                }[strategy]
                if x != MASK:
                    moves.append([((x, c), 1.0 - sigma), ((MASK, 0.0), sigma)])
                    continue
                shown = (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
                moves.append([((y, p[i][y]), shown * p[i][y]) for y in CLEAN])
                moves[-1].append(((MASK, 0.0), 1.0 - shown))
            for picks in itertools.product(*moves):
                share = weight * math.prod(chance for _, chance in picks)
                if share > 0.0:
                    key = tuple(value for value, _ in picks)
                    following[key] = following.get(key, 0.0) + share
        states = following
    return states


def text_law(states: dict[tuple, float]) -> Tensor:
    index = {tuple(x.tolist()): i for i, x in enumerate(all_sequences(LENGTH))}
    law = torch.zeros(len(index), dtype=torch.float64)
    for state, weight in states.items():
        law[index[tuple(x for x, _ in state)]] += weight
    return law


STRATEGIES = {"cap": 0.3, "rescale": 0.4, "conf": 1.0, "loop": 0.05}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_remasked_samples_follow_the_enumerated_law(strategy):
    joint, rows, eta = random_joint(3, LENGTH), 20_000, STRATEGIES[strategy]
    steps = 10 if strategy == "loop" else 5
    rule = build_rule("remask", family(), {"remasking": strategy, "eta": eta})
    start = torch.full((rows, LENGTH), MASK)
    walk = run(rule, reader(conditionals(joint, LENGTH)), start, keyed(rows, LENGTH), steps)
    law = text_law(remask_law(strategy, eta, joint, steps))
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert chi_square_p(texts_of(walk[-1].canvas), rows * law) > 1e-3
    # The masks in sight after every step, too.
    masked = torch.tensor([(step.canvas == MASK).sum() for step in walk]) / (rows * LENGTH)
    level = loop_alpha if strategy == "loop" else lambda t: 1.0 - t
    if strategy != "conf":
        planned = [1.0 - level(1.0 - j / steps) for j in range(1, steps)] + [0.0]
        assert (masked - torch.tensor(planned)).abs().max() < 4 * 0.5 / (rows * LENGTH) ** 0.5
    assert sum(len(step.remasked) for step in walk) > 1000


def test_remasking_follows_another_law_than_never_looking_back():
    """So that the test above could fail: the strategies differ from ancestral sampling."""
    joint = random_joint(3, LENGTH)
    laws = [text_law(remask_law(s, eta, joint, 5)) for s, eta in STRATEGIES.items()]
    plain = text_law(remask_law("cap", 0.0, joint, 5))
    assert all(total_variation(law, plain) > 1e-3 for law in laws[:3])


@pytest.mark.parametrize("strategy", ["cap", "rescale"])
def test_remasking_is_exact_in_the_limit_if_eta_falls_with_the_steps(strategy):
    joint = random_joint(3, LENGTH)
    distances = [
        total_variation(text_law(remask_law(strategy, 2.0 / steps, joint, steps)), joint)
        for steps in (4, 8, 16, 32, 64)
    ]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.3 for ratio in ratios)
    assert distances[-1] < 0.02
    held = total_variation(text_law(remask_law(strategy, 0.5, joint, 64)), joint)
    assert held > 2.0 * distances[-1]  # at a fixed eta a part of the error stays


def test_no_remasking_is_ancestral_sampling_in_law():
    joint = random_joint(3, LENGTH)
    rule = build_rule("remask", family(), {"eta": 0.0})
    rows, ask = 20_000, reader(conditionals(joint, LENGTH))
    start = torch.full((rows, LENGTH), MASK)
    law = text_law(remask_law("cap", 0.0, joint, 3))
    for chosen in (rule, Ancestral()):
        walk = run(chosen, ask, start, keyed(rows, LENGTH), 3)
        assert chi_square_p(texts_of(walk[-1].canvas), rows * law) > 1e-3


def test_calls_are_made_only_where_something_is_revealed():
    """A row that reveals nothing at a step is not in the call, and masked tokens are reported."""
    width, rows, steps = 6, 30, 40
    asked = []

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        asked.append(positions.flat)
        assert (canvas.flatten()[positions.flat] == MASK).all()
        log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
        log_x0[:, CLEAN[0]] = 0.0
        return Prediction(log_x0)

    rule = build_rule("remask", family(), {"eta": 0.1})
    canvas = torch.full((rows, width), MASK)
    frozen = torch.zeros_like(canvas, dtype=torch.bool)
    frozen[:, 0], canvas[:, 0] = True, CLEAN[2]
    frozen[5] = True
    walk = run(rule, denoise, canvas, keyed(rows, width), steps, frozen=frozen)
    before = canvas
    for step, positions in zip(walk, asked, strict=True):
        assert torch.isin(positions, step.changed).all()
        moved = (step.canvas != before).flatten().nonzero().flatten()
        assert torch.isin(moved, step.changed).all()
        hidden = (before != MASK) & (step.canvas == MASK)
        assert torch.isin(hidden.flatten().nonzero().flatten(), step.remasked).all()
        assert torch.equal(step.canvas[frozen], canvas[frozen])
        before = step.canvas
    assert sum(len(step.remasked) for step in walk) > 10
    assert (before[~frozen] == CLEAN[0]).all()
    assert len(walk) <= steps


def test_what_is_masked_follows_the_chances_step_by_step_also_between_calls():
    """One short row and many steps: most have no call, and some of those mask a token again."""
    width, steps, eta = 3, 60, 0.2
    draws, seen = keyed(1, width, seed=8), []

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        seen.append((float(t[0]), (canvas[0] == MASK).tolist()))
        log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
        log_x0[:, CLEAN[0]] = 0.0
        return Prediction(log_x0)

    rule = build_rule("remask", family(), {"eta": eta})
    run(rule, denoise, torch.full((1, width), MASK), draws, steps)
    masked, expected, quiet = [True] * width, [], 0
    for j in range(steps):
        alpha_t, alpha_s = j / steps, (j + 1) / steps
        sigma = min(eta, (1.0 - alpha_s) / alpha_t) if alpha_t else eta
        shown = (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t)
        u = draws(Stream.POSITION, j)[0].tolist()
        after = [v >= shown if hidden else v < sigma for hidden, v in zip(masked, u, strict=True)]
        if any(hidden and not now for hidden, now in zip(masked, after, strict=True)):
            expected.append((1.0 - alpha_t, masked))
        else:
            quiet += after != masked
        masked = after
    assert quiet >= 2
    assert [state for _, state in seen] == [state for _, state in expected]
    assert [t for t, _ in seen] == pytest.approx([t for t, _ in expected])


def test_no_token_gets_more_of_the_masks_than_its_largest_share():
    belief = torch.rand(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    revealed = torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) < 0.7
    belief[0], revealed[0] = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]), True
    rule = build_rule("remask", family(), {"remasking": "conf"})
    alphas = torch.tensor([0.3, 0.4], dtype=torch.float64)
    shares = rule.sigma(*alphas, belief, revealed) / sigma_max(*alphas)
    most = largest_share(revealed)
    assert bool((shares <= most).all())
    assert float(shares[0, 0] / most[0]) == pytest.approx(1.0, abs=2e-3)
    fewer = revealed & (belief < 0.5)  # known to be revealed, of more
    assert bool((shares.where(fewer, 0.0) <= largest_share(fewer)).all())


def test_conf_masks_again_what_was_least_likely_when_it_was_drawn():
    """Rows that show a token of 0.9 beside one of 0.05, whatever would have been the likeliest."""
    rows, steps, common, rare = 40_000, 4, CLEAN[0], CLEAN[1:]
    chances = {common: 0.9, rare[0]: 0.05, rare[1]: 0.05}

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
        for token, chance in chances.items():
            log_x0[:, token] = math.log(chance)
        return Prediction(log_x0)

    rule = build_rule("remask", family(), {"remasking": "conf"})
    start = torch.full((rows, LENGTH), MASK)
    walk = run(rule, denoise, start, keyed(rows, LENGTH), steps)
    before, step = walk[1].canvas, walk[2]  # alpha from 1/2 to 3/4: half a token per row is masked
    unlike = (before != MASK).all(1) & ((before == common).sum(1) == 1)
    lost = torch.zeros(rows * LENGTH, dtype=torch.bool).index_fill(0, step.remasked, True)
    lost = lost.view(rows, LENGTH)[unlike]
    sure = before[unlike] == common
    found = torch.tensor([lost[~sure].sum(), lost[sure].sum()]).double()
    shares = torch.tensor([-0.05, -0.9], dtype=torch.float64).softmax(0) * 0.5 * int(unlike.sum())
    assert len(lost) > 500
    for hits, expected in zip(found, shares, strict=True):
        pair = torch.stack([hits, len(lost) - hits])
        assert chi_square_p(pair, torch.stack([expected, len(lost) - expected])) > 1e-3


# --- predictor and corrector ----------------------------------------------------------------------

CASES = {
    "udlm": ("uniform", "udlm", True, {}),
    "gidd": ("hybrid", "gidd", True, {}),
    "d3pm": ("uniform", "d3pm", False, {"timesteps": 4}),
}


def dense_reader(case: str, joint: Tensor):
    process, _, leave_out, _ = CASES[case]
    lookup = code(sequences(process, LENGTH))

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        table = oracle(process, joint, t[:1], LENGTH, leave_out)[0].nan_to_num(0.0)
        state = (code(canvas)[:, None] == lookup).long().argmax(1)
        return Prediction(table[state].flatten(0, 1)[positions.flat], mixture=not leave_out)

    return denoise


def corrected_laws(
    case: str, joint: Tensor, steps: int, redraws: float
) -> list[tuple[Tensor, float]]:
    """By the matrices of the noise: kappa posterior + (1 - kappa) noise of the clean law.

    Returns:
        Of every step: [S] the law after it, and how many tokens change in it on average.
    """
    process = CASES[case][0]
    z = sequences(process, LENGTH)
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    law = kernel(process, times[:1])[1][0, :, CLEAN[0]][z].prod(-1)
    tokens, laws = list(CLEAN), []
    share = min(1.0, redraws / steps)
    for t, s in itertools.pairwise(times):
        q_t, q_s = kernel(process, t[None])[1][0], kernel(process, s[None])[1][0][:, tokens]
        # p(x_0 | x_t), its own position included; states that cannot be have no answer.
        clean = oracle(process, joint, t[None], LENGTH, leave_out=False)[0].exp().nan_to_num(0.0)
        clean = clean[..., tokens]
        each = (clean / q_t[z][..., tokens]).nan_to_num(0.0, 0.0, 0.0) @ q_s.T
        kept = each * _between(process, s, t)[z]
        move = (1.0 - share) * kept + share * (clean @ q_s.T)  # [S, L, ROWS]
        stays = move.gather(-1, z[..., None]).sum((1, 2))
        changes = float((law * (LENGTH - stays)).sum())
        law = law @ torch.stack([move[:, torch.arange(LENGTH), to].prod(-1) for to in z], 1)
        laws.append((law, changes))
    return laws


def clean_part(case: str, law: Tensor) -> Tensor:
    """[9] the law of texts, of one of noisy texts."""
    lookup = code(sequences(CASES[case][0], LENGTH))
    return law[(code(all_sequences(LENGTH))[:, None] == lookup).long().argmax(1)]


def _between(process: str, s: Tensor, t: Tensor) -> Tensor:
    """[ROWS, ROWS] q(x_t = row | x_s = column), as the solution of Q_t = M Q_s."""
    if process == "hybrid":
        return _hybrid_between(s, t)
    clean = torch.tensor(CLEAN)
    q_t, q_s = (kernel(process, x[None])[1][0][clean][:, clean] for x in (t, s))
    out = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    out[clean[:, None], clean] = q_t @ torch.linalg.inv(q_s)
    return out


def _hybrid_between(s: Tensor, t: Tensor) -> Tensor:
    """Sec. 3.2, arXiv:2503.04482: ratio of survival, plus what the marginals gain, in every row."""
    out = torch.zeros(ROWS, ROWS, dtype=torch.float64)
    (alpha_s,), q_s = kernel("hybrid", s[None])
    (alpha_t,), q_t = kernel("hybrid", t[None])
    states = [*CLEAN, MASK]
    lost_s, lost_t = q_s[0][:, CLEAN[0]].clone(), q_t[0][:, CLEAN[0]].clone()
    lost_s[CLEAN[0]] -= alpha_s
    lost_t[CLEAN[0]] -= alpha_t
    ratio = float(alpha_t / alpha_s)
    for x in states:
        out[:, x] = lost_t - ratio * lost_s
        out[x, x] += ratio
    return out


def corrected(case: str, joint: Tensor, steps: int, rows: int, knobs: dict, **rest):
    process, kind, _, options = CASES[case]
    chosen = world(process, kind, **options)
    start = chosen.process.prior((rows, LENGTH), keyed(rows, LENGTH, seed=99)(4, 0))
    rule = build_rule("predictor_corrector", chosen, knobs) if knobs is not None else Ancestral()
    ask = dense_reader(case, joint)
    return run(rule, ask, start, keyed(rows, LENGTH, seed=steps), steps, chosen, **rest)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("redraws", [1.0, 2.0])
def test_corrected_samples_follow_the_enumerated_law(case, redraws):
    """After every step: the last one hides what went before."""
    joint, rows, steps = random_joint(3, LENGTH), 20_000, 4
    lookup = code(sequences(CASES[case][0], LENGTH))
    walk = corrected(case, joint, steps, rows, {"redraws": redraws})
    laws = corrected_laws(case, joint, steps, redraws)
    for step, (law, changes) in zip(walk, laws, strict=True):
        assert float(law.sum()) == pytest.approx(1.0, abs=1e-9)
        counts = (code(step.canvas)[:, None] == lookup).double().sum(0)
        assert counts.sum() == rows
        possible = law > 0.0
        assert counts[~possible].sum() == 0
        assert chi_square_p(counts[possible], rows * law[possible]) > 1e-3
        assert abs(len(step.changed) / rows - changes) < 4 * (LENGTH / 4 * LENGTH / rows) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_corrected_distance_to_the_truth_falls_as_steps_double(case):
    joint = random_joint(3, LENGTH)
    steps = (4, 8, 16, 32, 64)
    laws = [clean_part(case, corrected_laws(case, joint, n, 1.0)[-1][0]) for n in steps]
    distances = [total_variation(law, joint) for law in laws]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.3 for ratio in ratios)
    assert distances[-1] < 0.03


@pytest.mark.parametrize("case", CASES)
def test_without_redraws_it_is_ancestral_sampling_token_for_token(case):
    joint = random_joint(3, LENGTH)
    plain = corrected(case, joint, 5, 300, None)
    walk = corrected(case, joint, 5, 300, {"redraws": 0.0})
    assert len(walk) == len(plain)
    for a, b in zip(walk, plain, strict=True):
        assert torch.equal(a.canvas, b.canvas)


# --- self-correction ------------------------------------------------------------------------------


def opinion(prefer: list[int], sure: list[float]):
    """A network that prefers one token per position, whatever it sees."""

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        at = positions.column
        p = torch.full((len(positions), ROWS), 0.0, dtype=torch.float64)
        chance = torch.tensor(sure, dtype=torch.float64)[at]
        p[:, list(CLEAN)] = ((1.0 - chance) / 2)[:, None].expand(-1, 3)
        p = p.scatter(1, torch.tensor(prefer)[at][:, None], chance[:, None])
        return Prediction(p.log())

    return denoise


def self_corrected(canvas: Tensor, denoise, knobs: dict, **rest):
    """The calls of self-correction, after one step that believes what it is given."""
    chosen = world("hybrid", "gidd")
    knobs = {"redraws": 0.0, "correction_temperature": 0.0, **knobs}
    rule = build_rule("predictor_corrector", chosen, knobs)
    first = []

    def ask(noisy: Tensor, t: Tensor, positions: Positions) -> Prediction:
        if not first:
            first.append(True)
            log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
            return Prediction(log_x0.scatter(1, canvas.flatten()[positions.flat][:, None], 0.0))
        return denoise(noisy, t, positions)

    start = torch.full_like(canvas, MASK)
    rest = {"frozen": torch.zeros_like(canvas, dtype=torch.bool), **rest}
    start = torch.where(rest["frozen"], canvas, start)
    draws = keyed(len(canvas), canvas.shape[1])
    return run(rule, ask, start, draws, 1, chosen, **rest)[1:]


def test_self_correction_commits_the_surest_other_token_one_per_call_and_stops():
    a, b, c = CLEAN
    canvas = torch.tensor([[a, a, a, a], [b, c, b, b], [b, c, c, b]])
    walk = self_corrected(canvas, opinion([b, c, b, b], [0.9, 0.5, 0.99, 0.8]), {"corrections": 9})
    moved = [[(int(p) // 4, int(p) % 4) for p in step.changed] for step in walk]
    assert moved[:4] == [[(0, 2), (2, 2)], [(0, 0)], [(0, 3)], [(0, 1)]]
    assert torch.equal(walk[-1].canvas, torch.tensor([[b, c, b, b]] * 3))
    assert len(walk) == 5  # the last one sees that there is nothing left
    assert [step.index for step in walk] == [1, 2, 3, 4, 5]


def test_self_correction_leaves_frozen_tokens_and_obeys_its_limit():
    a, b, _ = CLEAN
    canvas = torch.tensor([[a, a, a]])
    frozen = torch.tensor([[False, True, False]])
    network = opinion([b, b, b], [0.6, 0.9, 0.7])
    walk = self_corrected(canvas, network, {"corrections": 1}, frozen=frozen)
    assert walk[-1].canvas.tolist() == [[a, a, b]]
    walk = self_corrected(canvas, network, {"corrections": 50}, frozen=frozen)
    assert walk[-1].canvas.tolist() == [[b, a, b]]


def test_self_correction_loses_patience_where_the_share_does_not_rise():
    """A network that always wants what is not there."""
    a, b, _ = CLEAN

    def contrary(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        wanted = torch.where(canvas.flatten()[positions.flat] == a, b, a)
        p = torch.full((len(positions), ROWS), 0.0, dtype=torch.float64)
        return Prediction(p.scatter(1, wanted[:, None], 1.0).log())

    walk = self_corrected(torch.tensor([[a, a]]), contrary, {"corrections": 50, "patience": 4})
    assert len(walk) == 5  # the first sets the mark


def test_controls_hold_while_correcting():
    """Truncation leaves one token, however hot the draw."""
    a, b, c = CLEAN
    network = opinion([b, c], [0.5, 0.5])
    hot = {"corrections": 4, "correction_temperature": 50.0}
    one = Controls(top_k=1)
    walk = self_corrected(torch.tensor([[a, a]] * 50), network, hot, controls=one)
    assert walk[-1].canvas.tolist() == [[b, c]] * 50


def test_rules_are_refused_where_they_mean_nothing():
    with refused(ConfigError, "unsuitable_rule", "corrects tokens that noise has replaced, and"):
        build_rule("predictor_corrector", family())
    with refused(
        ConfigError, "unsuitable_rule", "masks tokens again at one rate for all of them, and"
    ):
        build_rule("remask", world("uniform", "udlm"))
    with refused(ConfigError, "unsuitable_rule", "noise here is absorbing by token"):
        build_rule("remask", family(schedule={"kind": "learned"}))
