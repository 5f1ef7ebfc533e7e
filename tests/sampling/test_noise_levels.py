"""The noise level that a network with time conditioning is given, by every rule."""

import pytest
import torch
from engines import generate
from noise_calls import noise_by_count
from test_rules import WIDTH, family_of
from tiny_models import tiny_family, tiny_model
from torch import Tensor

from textdiff.diffusion.family import Blocks
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.segment import Segment

ROWS, STEPS = 40, 5


def given_times(case: str, name: str, **knobs) -> tuple[list[Tensor], Tensor, list]:
    """Times of each call by row (NaN where a row was not in it), positions' uniforms, and steps."""
    family, seen = family_of(case), []
    generator = torch.Generator().manual_seed(0)
    size = len(family.process.vocabulary.clean)

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        rows = positions.row
        seen.append(
            torch.full((ROWS,), torch.nan, dtype=torch.float64).index_copy(0, rows, t[rows])
        )
        logits = torch.randn(len(positions), size, generator=generator, dtype=torch.float64)
        alpha = family.known_alpha(family.schedule.alpha(t))[rows]
        return family.objective.predict(logits, canvas.flatten()[positions.flat], alpha)

    def draws(stream: Stream, step: int) -> Tensor:
        rows = torch.arange(ROWS)[:, None]
        return uniforms(1, stream, row=rows, step=step, position=torch.arange(WIDTH))

    canvas = family.process.prior((ROWS, WIDTH), draws(Stream.PRIOR, 0))
    steps = list(
        build_rule(name, family, knobs)(
            Segment(
                denoise,
                family.process,
                family.schedule,
                canvas,
                steps=STEPS,
                frozen=torch.zeros(ROWS, WIDTH, dtype=torch.bool),
                uniforms=draws,
                controls=Controls(),
            )
        )
    )
    return seen, draws(Stream.POSITION, 0), steps


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether times agree where a row was called."""
    called = ~found.isnan()
    return bool(called.any()) and bool((found - expected)[called].abs().max() < 1e-12)


def test_first_hitting_gives_the_time_at_which_the_position_is_revealed():
    """alpha at that time is the position's own uniform, the smallest first."""
    family = family_of("mdlm")
    seen, u, steps = given_times("mdlm", "first_hitting")
    levels = u.sort(1).values
    assert len(seen) == WIDTH
    for index, (t, step) in enumerate(zip(seen, steps, strict=True)):
        assert (family.schedule.alpha(t) - levels[:, index]).abs().max() < 1e-12
        assert torch.equal(step.t, t)
        assert torch.equal(u.flatten()[step.changed], levels[:, index])


def test_ancestral_gives_the_start_of_the_step_that_reveals():
    seen, u, _ = given_times("mdlm", "ancestral")
    when = (u * STEPS).floor()  # of a linear schedule
    for row in range(ROWS):
        expected = sorted({1.0 - float(step) / STEPS for step in when[row]}, reverse=True)
        times = [float(t[row]) for t in seen if not t[row].isnan()]
        assert times == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("udlm", "ancestral"),
        ("gidd", "ancestral"),
        ("learned", "ancestral"),
        ("sedd", "euler"),
        ("sedd", "tweedie"),
        ("sedd-uniform", "tweedie"),
    ],
)
def test_rules_on_a_grid_give_the_start_of_each_step(case, name):
    seen, _, steps = given_times(case, name)
    for index, (t, step) in enumerate(zip(seen, steps, strict=True)):
        assert same(t, torch.full((ROWS,), 1.0 - index / STEPS, dtype=torch.float64))
        assert step.t[0] == pytest.approx(1.0 - index / STEPS, abs=1e-12)


@pytest.mark.parametrize("name", ["confidence", "threshold", "entropy_bound"])
def test_orders_of_their_own_give_the_mean_level_of_the_masks_left(name):
    """k of n masks: k / (n + 1), the mean in training by count."""
    seen, _, steps = given_times("mdlm", name)
    left = torch.full((ROWS,), float(WIDTH), dtype=torch.float64)
    for t, step in zip(seen, steps, strict=True):
        assert same(t, left / (WIDTH + 1))
        left -= torch.bincount(step.changed // WIDTH, minlength=ROWS)


def test_remasking_gives_the_time_of_its_own_share_of_masks():
    seen, _, steps = given_times("mdlm", "remask", remasking="loop", eta=0.3)
    grid = torch.linspace(1.0, 0.0, STEPS + 1, dtype=torch.float64)
    rising = 0.9 * (1.0 - grid) / 0.45
    expected = 1.0 - torch.maximum(rising.clamp(max=0.9), 1.0 - 0.1 * grid / 0.05)
    for t in seen:
        at = float(t[~t.isnan()][0])
        assert min(abs(at - float(e)) for e in expected[:-1]) < 1e-12
    assert len(steps) >= 3


def test_corrections_give_a_time_of_their_own():
    seen, _, _ = given_times("gidd", "predictor_corrector", corrections=2, correction_time=0.03)
    assert len(seen) == STEPS + 2
    for t in seen[STEPS:]:
        assert same(t, torch.full((ROWS,), 0.03, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_where_nothing_survives_a_block_is_given_the_mean_of_training_by_count(size):
    """All n tokens hit: alpha is 1 minus the largest of n uniforms, 1 / (n + 1) on average."""
    rows, family = 40_000, tiny_family(size)
    u = uniforms(3, Stream.POSITION, row=torch.arange(rows)[:, None], position=torch.arange(size))
    all_hit = torch.full((rows, 1), 1.0 - 1e-12, dtype=torch.float64)
    drawn = noise_by_count(NoiseUniforms(all_hit, u), Blocks.of(size, size)).alpha[:, 0]
    nothing = torch.zeros(1, dtype=torch.float64)
    assert float(family.known_alpha(nothing)) == 1.0 / (size + 1.0)
    assert abs(float(drawn.mean()) - 1.0 / (size + 1.0)) < 4.0 * float(drawn.std()) / rows**0.5
    assert float(tiny_family().known_alpha(nothing)) == 1e-3
    some = torch.tensor([0.25, 1.0], dtype=torch.float64)
    assert torch.equal(family.known_alpha(some), some)


def test_a_network_with_time_conditioning_sees_the_level_of_its_block(monkeypatch):
    """sigma of the active block is -ln alpha of its time; finished blocks have none."""
    model, family, seen = tiny_model(adaln=True, time_conditioning=True), tiny_family(4), []
    forward = model.forward

    def watching(*arguments, **options):
        seen.append(options["sigma"])
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", watching)
    steps = list(
        generate(
            model,
            family,
            Job([[]], [8]),
            rule="first_hitting",
            steps=1,
            controls=Controls(),
        )
    )
    assert len(steps) == len(seen) == 8
    for index, (step, sigma) in enumerate(zip(steps, seen, strict=True)):
        assert float(sigma[0, -1]) == pytest.approx(-float(family.schedule.alpha(step.t[0]).log()))
        assert sigma.shape[1] == index // 4 + 1
        assert bool((sigma[0, :-1] == 0.0).all())
