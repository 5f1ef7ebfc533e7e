"""Ancestral sampling under noise that draws tokens: its law, by enumeration and by chi-square."""

import itertools

import pytest
import torch
from dense_tables import kernel, oracle, sequences, world
from exact_stats import chi_square_p
from exact_tables import CLEAN, EXCLUDED, MASK, all_sequences, code, random_joint
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.segment import Segment

LENGTH = 2
CASES = {
    "udlm": ("uniform", "udlm", True, {}),
    "gidd": ("hybrid", "gidd", True, {}),
    "d3pm-mixture": ("uniform", "d3pm", False, {"timesteps": 4}),
    "d3pm-plugged": ("uniform", "d3pm", True, {"timesteps": 4, "parameterization": "plugged"}),
}


def family_of(case: str):
    process, kind, leave_out, options = CASES[case]
    return world(process, kind, **options), process, leave_out


def reverse_law(case: str, joint: Tensor, steps: int) -> Tensor:
    """[9] the law after `steps` steps of the library's posterior and the true denoiser."""
    family, process, leave_out = family_of(case)
    z = sequences(process, LENGTH)
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    law = kernel(process, times[:1])[1][0, :, CLEAN[0]][z].prod(-1)
    for t, s in itertools.pairwise(times):
        log_x0 = oracle(process, joint, t[None], LENGTH, leave_out)[0]
        alphas = [family.schedule.alpha(x).expand(z.numel()) for x in (s, t)]
        back = family.process.posterior(
            log_x0.nan_to_num(0.0).flatten(0, 1), z.flatten(), *alphas, mixture=not leave_out
        ).view(len(z), LENGTH, -1)
        move = torch.stack([back[:, torch.arange(LENGTH), to].prod(-1) for to in z], 1)
        law = (law[:, None] * move).where(law[:, None] > 0.0, 0.0).sum(0)
    found = {int(code(row)): float(p) for row, p in zip(z, law, strict=True)}
    texts = all_sequences(LENGTH)
    return torch.tensor([found[int(code(x))] for x in texts], dtype=torch.float64)


def sampled(case: str, joint: Tensor, steps: int, rows: int, frozen=None, start=None) -> Tensor:
    """[rows, L] samples by the library's rule with the true denoiser."""
    family, process, leave_out = family_of(case)
    lookup = code(sequences(process, LENGTH))

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        table = oracle(process, joint, t[:1], LENGTH, leave_out)[0].nan_to_num(0.0)
        state = (code(canvas)[:, None] == lookup).long().argmax(1)
        return Prediction(table[state].flatten(0, 1)[positions.flat], mixture=not leave_out)

    generator = torch.Generator().manual_seed(steps)

    def uniforms(stream, step: int) -> Tensor:
        return torch.rand(rows, LENGTH, generator=generator, dtype=torch.float64)

    canvas = family.process.prior((rows, LENGTH), uniforms(None, 0))
    if frozen is None:
        frozen = torch.zeros(rows, LENGTH, dtype=torch.bool)
    if start is not None:
        canvas = torch.where(frozen, start, canvas)
    *_, last = Ancestral()(
        Segment(
            denoise,
            family.process,
            family.schedule,
            canvas,
            steps=steps,
            frozen=frozen,
            uniforms=uniforms,
            controls=Controls(),
        )
    )
    return last.canvas


def counts(canvas: Tensor) -> Tensor:
    assert not ((canvas == MASK) | (canvas == EXCLUDED)).any()
    texts = code(all_sequences(LENGTH))
    return (code(canvas)[:, None] == texts).double().sum(0)


@pytest.mark.parametrize("case", CASES)
def test_distance_to_the_truth_falls_like_one_over_the_steps(case):
    joint = random_joint(3, LENGTH)
    laws = [reverse_law(case, joint, steps) for steps in (4, 8, 16, 32, 64)]
    assert all(float(law.sum()) == pytest.approx(1.0, abs=1e-9) for law in laws)
    distances = [0.5 * float((law - joint).abs().sum()) for law in laws]
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(distances)]
    assert all(ratio > 1.4 for ratio in ratios)
    assert 1.6 < ratios[-1] < 2.6
    assert distances[-1] < 0.03


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 4])
def test_samples_follow_the_enumerated_law(case, steps):
    joint, rows = random_joint(3, LENGTH), 20_000
    law = reverse_law(case, joint, steps)
    assert chi_square_p(counts(sampled(case, joint, steps, rows)), rows * law) > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_frozen_positions_never_change_and_condition_the_rest(case):
    joint, rows = random_joint(3, LENGTH), 4000
    start = torch.tensor([CLEAN[1], CLEAN[0]]).expand(rows, -1)
    frozen = torch.tensor([True, False]).expand(rows, -1)
    canvas = sampled(case, joint, 3, rows, frozen, start)
    assert (canvas[:, 0] == CLEAN[1]).all()
    assert not ((canvas == MASK) | (canvas == EXCLUDED)).any()
    assert len(canvas[:, 1].unique()) == len(CLEAN)


def test_the_last_step_leaves_no_noise_whatever_the_schedule_starts_from():
    """This schedule still has a fifth of its tokens noisy at t = 0."""
    schedule = {"kind": "geometric", "sigma_min": 0.2, "sigma_max": 5.0}
    family = world("uniform", "udlm", schedule=schedule)
    rows = 500
    sure = torch.full((1, 5), -torch.inf, dtype=torch.float64)
    sure[0, CLEAN[2]] = 0.0
    generator = torch.Generator().manual_seed(0)
    *_, last = Ancestral()(
        Segment(
            lambda canvas, t, positions: Prediction(sure.expand(len(positions), -1)),
            family.process,
            family.schedule,
            torch.full((rows, LENGTH), CLEAN[0]),
            steps=3,
            frozen=torch.zeros(rows, LENGTH, dtype=torch.bool),
            uniforms=lambda stream, step: torch.rand(rows, LENGTH, generator=generator).double(),
            controls=Controls(),
        )
    )
    assert (last.canvas == CLEAN[2]).all()
