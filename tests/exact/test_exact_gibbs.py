"""Leave-one-out distributions, posteriors and scores, and Gibbs updates, by enumeration."""

import itertools

import pytest
import torch
from dense_tables import likelihoods, oracle, sequences, world
from exact_tables import CLEAN, ROWS, random_joint
from rule_worlds import keyed, run, total_variation
from torch import Tensor

from textdiff.diffusion.leave_one_out import (
    leave_one_out_of,
    log_leave_one_out,
    log_posterior,
    posterior_of,
)
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream
from textdiff.sampling.draws import inverse_cdf
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.rules.gibbs import conditional

FAMILIES = {"uniform": "udlm", "hybrid": "gidd"}
EVERY = pytest.mark.parametrize("process", FAMILIES)
TIMES = torch.tensor([0.02, 0.4, 0.7, 0.98], dtype=torch.float64)


def noisy(process: str, joint: Tensor, t: float, length: int) -> Tensor:
    """[S] q_t of every noisy sequence."""
    time = torch.tensor([t], dtype=torch.float64)
    return likelihoods(process, time, length)[0].prod(-1) @ joint


def differ(a: Tensor, b: Tensor) -> float:
    """The largest difference at clean tokens; elsewhere both must be impossible."""
    others = [row for row in range(ROWS) if row not in CLEAN]
    assert (a[:, others] == -torch.inf).all()
    assert (b[:, others] == -torch.inf).all()
    return float((a - b)[:, list(CLEAN)].abs().max())


@EVERY
def test_conversions_are_those_of_the_enumerated_world_both_ways(process):
    joint, family = random_joint(3, 2), world(process, FAMILIES[process])
    z, noise = sequences(process, 2), family.process
    left_out, whole = (oracle(process, joint, TIMES, 2, flag) for flag in (True, False))
    for q, t in enumerate(TIMES):
        alpha = family.schedule.alpha(t).expand(z.numel())
        xt, loo, posterior = z.flatten(), left_out[q].flatten(0, 1), whole[q].flatten(0, 1)
        assert differ(log_posterior(noise, loo, xt, alpha), posterior) < 1e-11
        assert differ(log_leave_one_out(noise, posterior, xt, alpha), loo) < 1e-11
        for prediction in (Prediction(loo), Prediction(posterior, mixture=True)):
            assert differ(posterior_of(noise, prediction, xt, alpha), posterior) < 1e-11
            assert differ(leave_one_out_of(noise, prediction, xt, alpha), loo) < 1e-11
        score = noise.log_score(loo, xt, alpha)
        for row, position in itertools.product(range(len(z)), range(2)):
            other = z[row].repeat(len(CLEAN), 1)
            other[:, position] = torch.tensor(CLEAN)
            at = [int((z == text).all(1).nonzero()) for text in other]
            chances = noisy(process, joint, float(t), 2)
            ratios = (chances[at] / chances[row]).log()
            assert (score[2 * row + position, list(CLEAN)] - ratios).abs().max() < 1e-11
        assert differ(noise.log_x0(score, xt, alpha), loo) < 1e-8  # differences of ratios cancel


def updates(process: str, joint: Tensor, t: float, length: int) -> Tensor:
    """[S, L, ROWS] what the corrector draws each position from, given a whole noisy sequence."""
    family = world(process, FAMILIES[process])
    z = sequences(process, length)
    time = torch.tensor(t, dtype=torch.float64)
    loo = oracle(process, joint, time[None], length, True)[0].flatten(0, 1)
    alpha = family.schedule.alpha(time)
    drawn = conditional(family.process, Prediction(loo), z.flatten(), alpha)
    return drawn.view(len(z), length, ROWS)


def updated(process: str, chances: Tensor, each: Tensor, together: int) -> Tensor:
    """[S] the distribution after one call that redraws a random set of positions."""
    length = each.shape[1]
    z = sequences(process, length)
    chance = each[:, torch.arange(length), z].transpose(0, 1)  # [to, from, L]
    same = (z[:, None] == z).double()
    sets = list(itertools.combinations(range(length), together))
    after = torch.zeros_like(chances)
    for chosen in sets:
        move = same.clone()
        move[..., list(chosen)] = chance[..., list(chosen)]
        after += move.prod(-1) @ chances / len(sets)
    return after


@EVERY
@pytest.mark.parametrize("t", [0.1, 0.6, 0.95])
def test_one_redrawn_position_leaves_the_noisy_distribution_as_it_is(process, t):
    joint = random_joint(3, 3)
    chances, each = noisy(process, joint, t, 3), updates(process, joint, t, 3)
    assert (each.sum(-1) - 1.0).abs().max() < 1e-12
    for position in range(3):
        z = sequences(process, 3)
        # Not through `updated`: the mass of every sequence goes to its three or four neighbours.
        after = torch.zeros_like(chances)
        for row, token in itertools.product(range(len(z)), range(ROWS)):
            target = z[row].clone()
            target[position] = token
            if each[row, position, token] > 0.0:
                at = (z == target).all(1).nonzero()
                after[at] += chances[row] * each[row, position, token]
        assert (after - chances).abs().max() < 1e-12
    assert (updated(process, chances, each, 1) - chances).abs().max() < 1e-12


def test_several_positions_at_once_add_an_error_and_wrong_laws_come_closer():
    """Uniform noise at t = 0.3: 0.053 for 2 and 0.140 for 4 of 4 positions in total variation."""
    joint = random_joint(3, 4)
    chances, each = noisy("uniform", joint, 0.3, 4), updates("uniform", joint, 0.3, 4)
    error = {k: total_variation(updated("uniform", chances, each, k), chances) for k in (1, 2, 4)}
    assert error[1] < 1e-12 < error[2] < error[4]
    z = sequences("uniform", 4)
    apart = torch.ones(len(chances), dtype=torch.float64)  # the product of the chances's marginals
    for position in range(4):
        one = torch.stack([chances[z[:, position] == token].sum() for token in range(ROWS)])
        apart *= one[z[:, position]]
    start = total_variation(apart, chances)
    assert error[4] < start
    exact = several = apart
    distance = [start]
    for _ in range(40):
        exact, several = updated("uniform", exact, each, 1), updated("uniform", several, each, 2)
        distance.append(total_variation(exact, chances))
    assert all(after <= before + 1e-15 for before, after in itertools.pairwise(distance))
    assert distance[-1] < 0.02 * start
    assert distance[-1] < total_variation(several, chances) < start


# --- the rule -------------------------------------------------------------------------------------


def network(process: str, length: int, seed: int = 0):
    """A denoiser of random leave-one-out distributions that depend on the rest of the canvas."""
    states = sequences(process, length)
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(len(states), length, ROWS, generator=generator, dtype=torch.float64)
    table = torch.full_like(raw, -torch.inf)
    table[..., list(CLEAN)] = (1.5 * raw[..., list(CLEAN)]).log_softmax(-1)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        row = (canvas[:, None] == states).all(-1).long().argmax(1)
        return Prediction(table[row[positions.row], positions.column])

    return denoise


def walk(process: str, name: str, knobs: dict, steps: int, rows: int = 60, length: int = 3):
    family = world(process, FAMILIES[process])
    draws = keyed(rows, length)
    canvas = family.process.prior((rows, length), draws(Stream.PRIOR, 0))
    rule = build_rule(name, family, knobs)
    return run(rule, network(process, length), canvas, draws, steps, family), draws


@EVERY
def test_without_correctors_it_is_ancestral_sampling(process):
    (gibbs, _), (plain, _) = (
        walk(process, name, knobs, 5)
        for name, knobs in (("gibbs", {"correctors": 0}), ("ancestral", {}))
    )
    assert len(gibbs) == len(plain) == 5
    for a, b in zip(gibbs, plain, strict=True):
        assert torch.equal(a.canvas, b.canvas)


@EVERY
@pytest.mark.parametrize("choice", ["random", "confidence"])
def test_correctors_redraw_the_chosen_positions_at_the_level_reached(process, choice):
    knobs = {"correctors": 2, "positions": 2, "choice": choice}
    steps, draws = walk(process, "gibbs", knobs, 7)
    assert len(steps) == 7  # three steps, and two correctors after the first two of them
    family = world(process, FAMILIES[process])
    ask, positions = network(process, 3), Positions.where(torch.ones(60, 3, dtype=torch.bool))
    for index, number in ((1, 3), (2, 4), (4, 5), (5, 6)):
        before, after = steps[index - 1].canvas, steps[index].canvas
        t = torch.tensor(2 / 3 if index < 3 else 1 / 3, dtype=torch.float64)
        prediction, tokens = ask(before, t, positions), before.flatten()
        weights = conditional(family.process, prediction, tokens, family.schedule.alpha(t))
        stays = weights.gather(-1, tokens[:, None]).view(60, 3)
        fresh = inverse_cdf(weights, draws(Stream.TOKEN, number).flatten()).view(60, 3)
        keys = draws(Stream.POSITION, number) if choice == "random" else -stays
        chosen = torch.zeros_like(before, dtype=torch.bool).scatter(1, keys.topk(2).indices, True)
        assert torch.equal(after, torch.where(chosen, fresh, before))
