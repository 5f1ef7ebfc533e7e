"""Identity 19: the law of ancestral samples, by enumeration of its uniforms and in closed form."""

import itertools

import pytest
import torch
from engines import alone, generate
from exact_stats import chi_square_p
from exact_tables import (
    CLEAN,
    EXCLUDED,
    LENGTH,
    MASK,
    ROWS,
    Table,
    TableDenoiser,
    ancestral_law,
    family,
    oracle,
    random_joint,
)
from torch import Tensor

from textdiff.diffusion.randomness import Stream
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.rules.ancestral import Ancestral, reveal_steps
from textdiff.sampling.segment import Segment


@pytest.fixture(scope="module")
def joint():
    return random_joint(3)


@pytest.fixture(scope="module")
def truth(joint):
    return oracle(joint)


def step_law(schedule, steps: int) -> Tensor:
    """[T] the share of a fine grid of uniforms that `reveal_steps` sends to each step."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    grid = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    when = reveal_steps(schedule.alpha(times), grid)
    return torch.bincount(when, minlength=steps).double() / len(grid)


def frequencies(canvas: Tensor) -> Tensor:
    """[3 ** L] counts of every clean sequence; anything else is an error."""
    digit = torch.full((ROWS,), -1)
    digit[list(CLEAN)] = torch.arange(len(CLEAN))
    digits = digit[canvas]
    assert (digits >= 0).all()
    index = (digits * 3 ** torch.arange(LENGTH - 1, -1, -1)).sum(-1)
    return torch.bincount(index, minlength=3**LENGTH).double()


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum()) / 2


SCHEDULES = [
    *({"kind": kind} for kind in ("loglinear", "cosine", "polynomial", "geometric")),
    {"kind": "loglinear", "eps": 0.09},  # something of the text is left at t = 1
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda each: "-".join(map(str, each.values())))
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_reveal_steps_follow_the_posterior_of_the_process(schedule, steps):
    """Walking q(x_s | x_t) reveals at step j with the share that `reveal_steps` gives it."""
    chosen = family(schedule=schedule)
    alphas = chosen.schedule.alpha(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))
    log_x0 = torch.full((1, ROWS), -torch.inf, dtype=torch.float64)
    log_x0[0, CLEAN[0]] = 0.0
    masked = torch.tensor([MASK])
    still, law = 1.0, []
    for alpha_t, alpha_s in itertools.pairwise(alphas):
        back = chosen.process.posterior(log_x0, masked, alpha_s[None], alpha_t[None])
        law.append(still * float(back[0, CLEAN[0]]))
        still *= float(back[0, MASK])
    law[-1] += still  # what a schedule without ideal ends leaves is revealed at the last step
    found = step_law(chosen.schedule, steps)
    assert (found - torch.tensor(law, dtype=torch.float64)).abs().max() <= 2.0**-16


def test_every_uniform_gets_a_step_even_at_the_ends():
    alphas = family().schedule.alpha(torch.linspace(1.0, 0.0, 5, dtype=torch.float64))
    edges = torch.tensor([0.0, 2.0**-53, 0.25, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert reveal_steps(alphas, edges).tolist() == [0, 0, 1, 2, 3]


def dyadic_table(levels: int) -> Table:
    """Arbitrary conditionals in multiples of 1 / levels, so that a grid of uniforms is exact."""
    generator = torch.Generator().manual_seed(7)
    cuts = torch.rand(ROWS**LENGTH, LENGTH, levels - 1, generator=generator).argsort(-1)[..., :2]
    cuts = (cuts + 1).sort(-1).values.double()
    shares = torch.stack([cuts[..., 0], cuts[..., 1] - cuts[..., 0], levels - cuts[..., 1]], -1)
    log_p = torch.full((ROWS**LENGTH, LENGTH, ROWS), -torch.inf, dtype=torch.float64)
    log_p[..., list(CLEAN)] = (shares / levels).log()
    return Table(log_p)


def grid(levels: int) -> Tensor:
    """[levels ** L, L] midpoints of equal cells."""
    points = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    return torch.cartesian_prod(*[points] * LENGTH)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rule_has_exactly_the_enumerated_law(steps):
    """Every combination of reveal steps and token cells, through the rule itself."""
    levels = 8
    table, chosen = dyadic_table(levels), family()
    when, tokens = grid(steps), grid(levels)
    rows = len(when) * len(tokens)
    draws = {
        Stream.POSITION: when.repeat_interleave(len(tokens), 0),
        Stream.TOKEN: tokens.repeat(len(when), 1),
    }
    denoise = alone(TableDenoiser(table), chosen, torch.full((rows,), LENGTH))
    walk = Ancestral()(
        Segment(
            denoise,
            chosen.process,
            chosen.schedule,
            chosen.process.prior((rows, LENGTH)),
            steps=steps,
            frozen=torch.zeros(rows, LENGTH, dtype=torch.bool),
            uniforms=lambda stream, step: draws[stream],
            controls=Controls(),
        )
    )
    *_, last = walk
    uniform = torch.full((steps,), 1.0 / steps, dtype=torch.float64)
    assert (frequencies(last.canvas) / rows - ancestral_law(table, uniform)).abs().max() < 1e-12


def test_law_adds_up_to_one_and_forgets_the_grid_for_consistent_conditionals(joint, truth):
    """One token at a time gives exactly P: at many steps only ties are left."""
    steps = torch.full((200,), 1 / 200, dtype=torch.float64)
    law = ancestral_law(truth, steps)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    ties = 1.0 - (1 - 1 / 200) * (1 - 2 / 200)
    assert total_variation(law, joint) <= ties


@pytest.mark.parametrize("kind", ["loglinear", "cosine"])
def test_one_step_is_the_product_of_marginals(joint, truth, kind):
    law = ancestral_law(truth, step_law(family(schedule={"kind": kind}).schedule, 1))
    cube = joint.view(3, 3, 3)
    marginals = [cube.sum((1, 2)), cube.sum((0, 2)), cube.sum((0, 1))]
    product = torch.einsum("i,j,k->ijk", *marginals).flatten()
    assert (law - product).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["loglinear", "cosine", "polynomial"])
def test_distance_to_the_joint_halves_with_every_doubling_of_the_steps(joint, truth, kind):
    schedule = family(schedule={"kind": kind}).schedule
    distances = [
        total_variation(ancestral_law(truth, step_law(schedule, 2**power)), joint)
        for power in range(7)
    ]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.25 for ratio in ratios)
    assert ratios == sorted(ratios)  # the first-order rate is approached from below
    assert 1.9 < ratios[-1] < 2.05


def sample(denoiser, chosen, rows: int, steps: int, chunk: int = 4000, seed: int = 0) -> Tensor:
    """Unconditional samples through the public function, in chunks of one job."""
    parts = []
    for start in range(0, rows, chunk):
        count = min(chunk, rows - start)
        job = Job([[]] * count, [LENGTH] * count, first_row=start, seed=seed)
        walk = generate(denoiser, chosen, job, rule="ancestral", steps=steps, controls=Controls())
        *_, last = walk
        parts.append(last.canvas)
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["loglinear", "cosine"])
def test_samples_at_four_steps_follow_the_exact_law_and_not_the_joint(joint, truth, kind):
    chosen, rows = family(schedule={"kind": kind}), 40_000
    times = torch.linspace(1.0, 0.0, 5, dtype=torch.float64)
    law = ancestral_law(truth, chosen.schedule.alpha(times).diff())
    counts = frequencies(sample(TableDenoiser(truth), chosen, rows, 4))
    assert chi_square_p(counts, rows * law) > 1e-3
    assert chi_square_p(counts, rows * joint) < 1e-6


def test_samples_at_many_steps_follow_the_joint(joint, truth):
    rows = 6000
    counts = frequencies(sample(TableDenoiser(truth), family(), rows, 4096, chunk=1500))
    assert chi_square_p(counts, rows * joint) > 1e-3


@pytest.mark.parametrize("steps", [1, 5])
def test_blocks_of_one_token_sample_the_joint_at_any_number_of_steps(joint, truth, steps):
    rows = 20_000
    counts = frequencies(sample(TableDenoiser(truth), family(1), rows, steps))
    assert chi_square_p(counts, rows * joint) > 1e-3


def test_blocks_of_two_are_parallel_inside_a_block_only(joint, truth):
    """One step per block: p(x_0) p(x_1) p(x_2 | x_0, x_1)."""
    rows = 20_000
    cube = joint.view(3, 3, 3)
    pair = cube.sum(2)
    law = pair.sum(1)[:, None, None] * pair.sum(0)[None, :, None] * cube / pair[..., None]
    counts = frequencies(sample(TableDenoiser(truth), family(2), rows, 1))
    assert chi_square_p(counts, rows * law.flatten()) > 1e-3


def test_prompts_condition_the_law(joint, truth):
    """Samples after a prompt follow P(x_1, x_2 | x_0) at many steps."""
    rows = 4000
    first = 1
    job = Job([[CLEAN[first]]] * rows, [2] * rows)
    *_, last = generate(
        TableDenoiser(truth), family(), job, rule="ancestral", steps=512, controls=Controls()
    )
    counts = frequencies(last.canvas).view(3, 9)
    assert counts[[0, 2]].sum() == 0
    conditional = joint.view(3, 9)[first]
    assert chi_square_p(counts[first], rows * conditional / conditional.sum()) > 1e-3


def test_only_clean_tokens_are_ever_written(truth):
    job = Job([[]] * 500, [LENGTH] * 500)
    revealed = torch.zeros(500, LENGTH, dtype=torch.bool)
    for step in generate(
        TableDenoiser(truth), family(), job, rule="ancestral", steps=6, controls=Controls()
    ):
        now = step.canvas != MASK
        assert (now | ~revealed).all()  # nothing is masked again
        changed = torch.zeros_like(revealed).flatten().index_fill(0, step.changed, True)
        assert torch.equal(changed.view_as(now), now & ~revealed)
        revealed = now
        assert not (step.canvas == EXCLUDED).any()
    assert revealed.all()
