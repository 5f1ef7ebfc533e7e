"""Rules that choose positions by what the network says: their exact laws, through the rules."""

import pytest
import torch
from exact_stats import chi_square_p
from exact_tables import CLEAN, MASK, ROWS, all_sequences, code, family, random_table
from rule_worlds import (
    LENGTH,
    conditionals,
    divergence,
    forced,
    keyed,
    reader,
    run,
    total_variation,
    truth,
)

from textdiff.diffusion.objectives import Prediction
from textdiff.sampling.controls import Controls
from textdiff.sampling.rules import Rule, build_rule

ONE_AT_A_TIME = {
    "first_hitting": ("first_hitting", {}, 1),
    "probability": ("confidence", {"order": "probability"}, LENGTH),
    "margin": ("confidence", {"order": "margin"}, LENGTH),
    "entropy": ("confidence", {"order": "entropy"}, LENGTH),
    "random": ("confidence", {"order_temperature": 2.0}, LENGTH),
    "more-steps": ("confidence", {}, 100),
    "threshold": ("threshold", {"threshold": 1.0}, LENGTH),
    "factor": ("threshold", {"factor": 1e-9}, 9),
    "entropy_bound": ("entropy_bound", {"entropy_bound": 0.0}, LENGTH),
}


@pytest.fixture(scope="module")
def world():
    return truth()


def rule_of(name: str, knobs: dict) -> Rule:
    return build_rule(name, family(), knobs)


@pytest.mark.parametrize("case", ONE_AT_A_TIME)
def test_one_token_per_call_has_exactly_the_true_law_in_any_order(world, case):
    joint, table = world
    name, knobs, steps = ONE_AT_A_TIME[case]
    for seed in range(3):
        law, _ = forced(rule_of(name, knobs), table, steps, seed)
        assert (law - joint).abs().max() < 1e-12


@pytest.mark.parametrize("order", ["probability", "margin", "entropy"])
@pytest.mark.parametrize("pace", ["even", "noise"])
def test_distance_to_the_truth_falls_as_steps_double(world, order, pace):
    joint, table = world
    rule = rule_of("confidence", {"order": order, "pace": pace})
    distances = [total_variation(forced(rule, table, steps)[0], joint) for steps in (1, 2, 4)]
    assert distances[0] > distances[1] > 1e-3
    assert distances[2] < 1e-12


def test_distance_falls_with_the_entropy_bound_and_with_the_threshold(world):
    joint, table = world
    for name, knob, values in [
        ("entropy_bound", "entropy_bound", (10.0, 1.0, 0.8, 0.0)),
        ("threshold", "threshold", (0.0, 0.45, 1.0)),
        ("threshold", "factor", (10.0, 1.5, 1e-6)),
    ]:
        laws = [forced(rule_of(name, {knob: value}), table, LENGTH)[0] for value in values]
        distances = [total_variation(law, joint) for law in laws]
        assert distances == sorted(distances, reverse=True)
        assert len(set(distances)) == len(values)
        assert distances[-1] < 1e-12


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.6, 1.0, 10.0])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_reported_dependence_bounds_the_divergence_from_the_truth(gamma, seed):
    joint, table = truth(seed)
    law, nats = forced(rule_of("entropy_bound", {"entropy_bound": gamma}), table, LENGTH)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    promised = float((joint * nats).sum())
    assert divergence(joint, law) <= promised + 1e-12
    assert (promised > 0.5) if gamma == 10.0 else (promised <= gamma * LENGTH)


def test_dependence_is_what_steps_beyond_the_bound_risk(world):
    """One call reveals everything, whatever the bound: the report says so."""
    joint, table = world
    law, nats = forced(rule_of("entropy_bound", {"entropy_bound": 0.0}), table, 1)
    assert divergence(joint, law) <= float(nats[0])
    marginals = table.log_p[code(torch.full((LENGTH,), MASK))].exp()[:, list(CLEAN)]
    entropies = torch.special.entr(marginals).sum(-1)
    assert float(nats[0]) == pytest.approx(float(entropies.sum() - entropies.max()), abs=1e-12)


def test_a_factor_of_one_reveals_what_is_likeliest_jointly(world):
    """In parallel as one by one, at temperature 0 (arXiv:2505.22618)."""
    generator = torch.Generator().manual_seed(0)
    agreed = multiple = 0
    for seed in range(30):
        joint = (6.0 * torch.randn(3**LENGTH, generator=generator, dtype=torch.float64)).softmax(-1)
        table = conditionals(joint)
        start = torch.full((1, LENGTH), MASK)
        cold = Controls(temperature=0.0)
        walk = run(
            rule_of("threshold", {"factor": 1.0}),
            reader(table),
            start,
            keyed(1, LENGTH, seed),
            LENGTH,
            controls=cold,
        )
        first = walk[0]
        multiple += len(first.changed) > 1
        chosen = first.canvas[0, first.changed]
        cube = joint.view([3] * LENGTH)
        rest = [i for i in range(LENGTH) if i not in first.changed.tolist()]
        together = cube.sum(rest) if rest else cube
        digits = torch.tensor([CLEAN.index(int(token)) for token in chosen])
        agreed += int((together.flatten().argmax() == _index(digits)).item())
    assert multiple >= 5
    assert agreed == 30


def _index(digits: torch.Tensor) -> torch.Tensor:
    return (digits * 3 ** torch.arange(len(digits) - 1, -1, -1)).sum()


# --- which positions, by hand ---------------------------------------------------------------------

PROBABILITIES = torch.tensor(  # of the three clean tokens, at seven positions
    [
        [0.50, 0.48, 0.02],
        [0.45, 0.30, 0.25],
        [0.95, 0.03, 0.02],
        [0.70, 0.15, 0.15],
        [0.60, 0.40, 0.00],
        [0.92, 0.08, 0.00],
        [0.40, 0.30, 0.30],
    ],
    dtype=torch.float64,
)
WIDTH = len(PROBABILITIES)


def fixed(canvas, t, positions):
    """The same prediction whatever is revealed, with a loud value where none may look."""
    log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
    log_x0[:, list(CLEAN)] = PROBABILITIES.log()[positions.column]
    return Prediction(log_x0)


def revealed(name: str, knobs: dict, steps: int, frozen=None) -> list[list[int]]:
    """Which positions each call reveals, of one row."""
    canvas = torch.full((1, WIDTH), MASK)
    frozen = torch.zeros_like(canvas, dtype=torch.bool) if frozen is None else frozen
    walk = run(rule_of(name, knobs), fixed, canvas, keyed(1, WIDTH), steps, frozen=frozen)
    return [sorted(step.changed.tolist()) for step in walk]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("probability", [2, 5, 3, 4, 0, 1, 6]),
        ("margin", [2, 5, 3, 4, 1, 6, 0]),
        ("entropy", [2, 5, 4, 0, 3, 1, 6]),
    ],
)
def test_orders_are_what_they_say(order, expected):
    calls = revealed("confidence", {"order": order}, WIDTH)
    assert [where for call in calls for where in call] == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 50])
def test_even_pace_gives_the_first_calls_what_is_left_over(steps):
    """floor(M / S), and one more in the first M mod S calls (generate.py of arXiv:2502.09992)."""
    counts = [len(call) for call in revealed("confidence", {}, steps)]
    calls = min(steps, WIDTH)
    assert counts == [WIDTH // calls + (j < WIDTH % calls) for j in range(calls)]


def test_pace_of_the_noise_follows_its_schedule():
    """alpha = 1 - cos(pi (1 - t) / 2): few first, most at the end."""
    canvas = torch.full((1, 100), MASK)
    chosen = family(schedule={"kind": "cosine"})
    rule = build_rule("confidence", chosen, {"pace": "noise"})

    def flat(canvas, t, positions):
        log_x0 = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
        log_x0[:, CLEAN[0]] = 0.0
        return Prediction(log_x0)

    walk = run(rule, flat, canvas, keyed(1, 100), 8, chosen)
    left = [int((step.canvas == MASK).sum()) for step in walk]
    planned = torch.sin(0.5 * torch.pi * (1.0 - torch.arange(1, 9, dtype=torch.float64) / 8)) * 100
    assert left == [int(x) for x in planned.clamp(min=0.0)]


def test_thresholds_reveal_what_is_sure_enough_and_at_least_the_surest():
    assert revealed("threshold", {"threshold": 0.9}, 50) == [[2, 5], [3], [4], [0], [1], [6]]
    assert revealed("threshold", {"threshold": 0.55}, 50) == [[2, 3, 4, 5], [0], [1], [6]]
    assert revealed("threshold", {"threshold": 0.0}, 50) == [[*range(WIDTH)]]


def test_factor_takes_the_longest_beginning_that_fits():
    """(n + 1)(1 - c_n) is 0.10, 0.24, 1.2 for the three surest; then 0.60 for a single 0.70."""
    assert revealed("threshold", {"factor": 0.25}, 50)[:2] == [[2, 5], [3]]
    assert revealed("threshold", {"factor": 0.23}, 50)[:2] == [[2], [5]]
    assert revealed("threshold", {"factor": 1.21}, 50)[0] == [2, 3, 5]


def test_entropy_bound_adds_all_entropies_but_the_largest():
    nats = torch.special.entr(PROBABILITIES).sum(-1)
    three = float(nats[2] + nats[5])  # and position 4, whose entropy is the largest, for nothing
    assert revealed("entropy_bound", {"entropy_bound": three + 1e-9}, 50)[0] == [2, 4, 5]
    assert revealed("entropy_bound", {"entropy_bound": three - 1e-9}, 50)[0] == [2, 5]


@pytest.mark.parametrize("name", ["threshold", "entropy_bound"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_steps_are_the_most_calls_whatever_the_criterion(name, steps):
    knob = "threshold" if name == "threshold" else "entropy_bound"
    calls = revealed(name, {knob: 1.0 if name == "threshold" else 0.0}, steps)
    assert len(calls) == steps
    assert sorted(where for call in calls for where in call) == list(range(WIDTH))


def test_order_temperature_draws_in_proportion_to_sureness():
    rows = 20_000
    canvas = torch.full((rows, WIDTH), MASK)
    rule = rule_of("confidence", {"order_temperature": 0.5})
    first = run(rule, fixed, canvas, keyed(rows, WIDTH), WIDTH)[0]
    counts = torch.bincount(first.changed % WIDTH, minlength=WIDTH).double()
    share = PROBABILITIES.amax(-1).square()
    assert chi_square_p(counts, rows * share / share.sum()) > 1e-3


def test_networks_that_see_time_are_told_the_mean_level_of_so_many_masks():
    seen = []

    def noting(canvas, t, positions):
        seen.append(t)
        return fixed(canvas, t, positions)

    canvas = torch.full((2, WIDTH), MASK)
    frozen = torch.tensor([[False] * WIDTH, [True] * 4 + [False] * 3])
    chosen = family(schedule={"kind": "polynomial", "exponent": 2.0})
    rule = build_rule("confidence", chosen, {})
    run(rule, noting, canvas, keyed(2, WIDTH), WIDTH, chosen, frozen=frozen)
    times = torch.stack(seen)
    lost = torch.arange(7, 0, -1) / 8
    assert (times[:, 0].square() - lost).abs().max() < 1e-12
    assert (times[:3, 1].square() - torch.tensor([3, 2, 1]) / 4).abs().max() < 1e-12


def test_samples_of_inconsistent_conditionals_follow_the_walked_law():
    """Through plain sampling: the tokens are drawn, not forced."""
    table, rows = random_table(2, LENGTH), 20_000
    rule = rule_of("confidence", {"order": "entropy"})
    law, _ = forced(rule, table, 2)
    canvas = torch.full((rows, LENGTH), MASK)
    last = run(rule, reader(table), canvas, keyed(rows, LENGTH), 2)[-1].canvas
    counts = (code(last)[:, None] == code(all_sequences(LENGTH))).double().sum(0)
    assert chi_square_p(counts, rows * law) > 1e-3
    other, _ = forced(rule, table, LENGTH)
    assert chi_square_p(counts, rows * other) < 1e-6
