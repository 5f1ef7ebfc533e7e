"""Rules that accept and renoise, and rules that stop once their text is stable."""

import pytest
import torch
from dense_tables import world
from engines import generate
from exact_tables import CLEAN, ROWS
from refusals import refused
from rule_worlds import keyed, run
from tiny_models import EXCLUDED, tiny_model
from tiny_models import MASK as TINY_MASK
from tiny_models import ROWS as TINY_ROWS
from torch import Tensor

from textdiff.diffusion.family import build_family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import inverse_cdf
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.rules.renoising import level

FAMILIES = {"uniform": "udlm", "hybrid": "gidd"}
EVERY = pytest.mark.parametrize("process", FAMILIES)
WIDTH, BATCH = 6, 40


def peaked(chances: Tensor):
    """p(x_0 | x_t) of the same numbers on every canvas: the first token's chance by position."""
    p = torch.zeros(len(chances), ROWS, dtype=torch.float64)
    p[:, list(CLEAN)] = ((1.0 - chances) / 2.0)[:, None]
    p[:, CLEAN[0]] = chances

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        return Prediction(p.log()[positions.column], mixture=True)

    return p, denoise


def walk(process: str, name: str, denoise, steps: int, knobs: dict | None = None, **rest):
    family = world(process, FAMILIES[process])
    draws = keyed(BATCH, WIDTH)
    canvas = family.process.prior((BATCH, WIDTH), draws(Stream.PRIOR, 0))
    rule = build_rule(name, family, knobs)
    return run(rule, denoise, canvas, draws, steps, family, **rest), draws, family


CHANCES = torch.tensor([0.97, 0.5, 0.99, 0.999, 0.7, 0.9], dtype=torch.float64)
ACCEPTED = [  # of positions by rising entropy: 3 (0.009), 2 (0.06), 0 (0.16), 5 (0.39), 4, 1
    ("entropy_bound", {"entropy_bound": 0.0}, {3}),
    ("entropy_bound", {"entropy_bound": 0.01}, {3, 2}),
    ("entropy_bound", {"entropy_bound": 0.08}, {3, 2, 0}),
    ("entropy_bound", {"entropy_bound": 0.24}, {3, 2, 0, 5}),
    ("threshold", {"threshold": 0.97}, {3, 2, 0}),
    ("threshold", {"threshold": 1.0}, {3}),
    ("threshold", {"threshold": 0.0}, {0, 1, 2, 3, 4, 5}),
    ("threshold", {"factor": 0.2}, {3, 2, 0}),  # 4 (1 - 0.97) = 0.12, 5 (1 - 0.9) = 0.5
]


@EVERY
@pytest.mark.parametrize(("name", "knobs", "accepted"), ACCEPTED)
def test_the_accepted_are_drawn_and_all_others_are_new_noise(process, name, knobs, accepted):
    p, denoise = peaked(CHANCES)
    steps, draws, family = walk(process, name, denoise, 4, knobs)
    kept = torch.tensor([position in accepted for position in range(WIDTH)])
    assert len(steps) == 4
    for index, step in enumerate(steps[:-1]):
        tokens = inverse_cdf(p.repeat(BATCH, 1), draws(Stream.TOKEN, index).flatten())
        alpha = level(torch.tensor([WIDTH - len(accepted)]), torch.tensor([WIDTH]))
        noise = family.process.corruptions(alpha, draws(Stream.POSITION, index))
        assert torch.equal(step.canvas, torch.where(kept, tokens.view(BATCH, WIDTH), noise))
        t = family.schedule.t_of_alpha(alpha).item() if index else 1.0
        assert (step.t - t).abs().max() < 1e-12
        again = torch.arange(BATCH * WIDTH)[~kept.repeat(BATCH)]
        assert torch.equal(step.remasked, again)
        if name == "entropy_bound":
            assert (step.dependence <= knobs["entropy_bound"]).all()
    assert (steps[-1].canvas == CLEAN[0]).all()  # the likeliest text


@EVERY
def test_an_infinite_bound_is_one_step_of_ancestral_sampling(process):
    _, denoise = peaked(CHANCES)
    walks = [
        walk(process, "entropy_bound", denoise, 2, {"entropy_bound": 1e9})[0],
        walk(process, "threshold", denoise, 2, {"threshold": 0.0})[0],
    ]
    one = walk(process, "ancestral", denoise, 1)[0]
    for steps in walks:
        assert torch.equal(steps[0].canvas, one[0].canvas)
        assert not len(steps[0].remasked)


def test_the_temperature_falls_with_the_calls():
    _, denoise = peaked(torch.full((WIDTH,), 0.8, dtype=torch.float64))
    hot, warm = (
        walk("uniform", "threshold", denoise, 3, {"threshold": 0.0}, controls=controls)[0]
        for controls in (Controls(temperature="9:0"), Controls(temperature=9.0))
    )
    assert torch.equal(hot[0].canvas, warm[0].canvas)
    assert not torch.equal(hot[1].canvas, warm[1].canvas)


# --- adaptive stopping ----------------------------------------------------------------------------

STOPPING = ["ancestral", "predictor_corrector", "gibbs", "threshold", "entropy_bound"]


@EVERY
@pytest.mark.parametrize("name", STOPPING)
def test_a_converged_row_stops_early_with_the_text_that_all_calls_give(process, name):
    sure = torch.full((WIDTH,), 1.0 - 1e-9, dtype=torch.float64)
    _, denoise = peaked(sure)
    knobs = {"stable_calls": 2, "stable_entropy": 1e-6}
    whole, early = (walk(process, name, denoise, 16, k)[0] for k in ({}, knobs))
    assert len(whole) > 12
    assert len(early) <= 5  # the first call, two repetitions, and correctors between them
    assert torch.equal(whole[-1].canvas, early[-1].canvas)
    for a, b in zip(whole, early[:-1], strict=False):
        assert torch.equal(a.canvas, b.canvas)
    uncertain = walk(process, name, denoise, 16, {"stable_calls": 2, "stable_entropy": 0.0})[0]
    assert len(uncertain) == len(whole)


def test_rows_stop_on_their_own():
    """The likeliest text of odd rows changes with every call; that of even rows does not."""
    calls = []

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        row = positions.row
        calls.append(row.unique())
        token = torch.where(row % 2 == 1, len(calls) % 2, 0)
        log_p = torch.full((len(positions), ROWS), -torch.inf, dtype=torch.float64)
        return Prediction(log_p.scatter(1, torch.tensor(CLEAN)[token][:, None], 0.0), mixture=True)

    walk("uniform", "ancestral", denoise, 9, {"stable_calls": 3})
    even = torch.arange(0, BATCH, 2)
    assert [torch.isin(even, rows).all().item() for rows in calls] == [True] * 4 + [False] * 5
    assert all(len(rows) == BATCH // 2 for rows in calls[4:])


@pytest.mark.parametrize("name", ["ancestral", "threshold", "entropy_bound"])
def test_masks_that_stay_revealed_leave_nothing_to_stop(name):
    with refused(ConfigError, "nothing_revised"):
        build_rule(name, world("absorbing", "mdlm"), {"stable_calls": 1})


@pytest.mark.parametrize("name", ["gibbs", "entropy_bound"])
def test_a_cache_changes_nothing_in_blocks(name):
    """Rows that stop early wait for the others at the end of a block, with their cache in place."""
    model = tiny_model(adaln=True, time_conditioning=True)
    spec = {
        "process": "uniform",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "udlm"},
        "block_size": 4,
    }
    family = build_family(spec, Vocabulary.of(TINY_ROWS, TINY_MASK, EXCLUDED))
    knobs = {"stable_calls": 1, "stable_entropy": 1.5}
    job = Job([[], [2] * 3, [3] * 6], [9, 7, 8], seed=2)
    last = [
        list(generate(model, family, job, rule=name, knobs=knobs, steps=6, cache=cache))[-1]
        for cache in ("on", "off")
    ]
    assert torch.equal(last[0].canvas, last[1].canvas)
    assert last[0].rows < 3 * 3 * 6  # not every row made all calls
    assert not (last[0].canvas == TINY_MASK).any()
