"""Generation under noise that draws tokens: a row depends on its own keys alone."""

import pytest
import torch
from engines import generate
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

PROMPTS = [[], [0, 5, 2], [1, 1, 8, 7, 3], [6], [2, 0, 3, 3, 5, 6, 7, 8, 0]]
NEW = [6, 4, 7, 16 - 1, 2]
CASES = {
    "udlm": ("uniform", {"kind": "udlm"}),
    "sedd-uniform": ("uniform", {"kind": "sedd"}),
    "gidd": ("hybrid", {"kind": "gidd"}),
    "d3pm-uniform": ("uniform", {"kind": "d3pm"}),
    "d3pm-uniform-plugged": ("uniform", {"kind": "d3pm", "parameterization": "plugged"}),
}
EVERY = pytest.mark.parametrize("case", CASES)
BLOCKS = pytest.mark.parametrize("block_size", [None, 4, 1])


def family_of(case: str, block_size: int | None = None) -> Family:
    process, objective = CASES[case]
    spec = {
        "process": process,
        "schedule": {"kind": "hybrid" if process == "hybrid" else "loglinear"},
        "objective": objective,
        "block_size": block_size,
        "timesteps": 6 if objective["kind"] == "d3pm" else None,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def walk(model, family: Family, job: Job, steps: int = 5, **controls):
    chosen = Controls(**controls)
    return list(generate(model, family, job, rule="ancestral", steps=steps, controls=chosen))


def rows_of(model, family: Family, job: Job, steps: int = 5, **controls) -> list[list[int]]:
    """The finished rows, without their padding."""
    canvas = walk(model, family, job, steps, **controls)[-1].canvas
    return [row[:n].tolist() for row, n in zip(canvas, job.lengths.tolist(), strict=True)]


@BLOCKS
@EVERY
def test_a_row_does_not_depend_on_who_shares_its_batch(model, case, block_size):
    family, steps = family_of(case, block_size), 2 if block_size == 1 else 5
    together = rows_of(model, family, Job(PROMPTS, NEW, seed=3), steps)
    for row in (0, 3):  # the longest, and one without a prompt
        alone = Job(PROMPTS[row : row + 1], NEW[row : row + 1], first_row=row, seed=3)
        assert rows_of(model, family, alone, steps) == together[row : row + 1]
    halves = [
        *rows_of(model, family, Job(PROMPTS[:2], NEW[:2], seed=3), steps),
        *rows_of(model, family, Job(PROMPTS[2:], NEW[2:], first_row=2, seed=3), steps),
    ]
    assert together == halves
    strangers = [[8] * 12, PROMPTS[1], [], [], [3]]
    changed = rows_of(model, family, Job(strangers, [4, NEW[1], 1, 1, 1], seed=3), steps)
    assert changed[1] == together[1]


@EVERY
def test_rows_differ_by_seed_and_by_index(model, case):
    family = family_of(case)
    rows = rows_of(model, family, Job([[0]] * 6, [12] * 6, seed=3), temperature=20.0)
    assert len(set(map(tuple, rows))) == 6
    other = rows_of(model, family, Job([[0]] * 6, [12] * 6, seed=4), temperature=20.0)
    assert not set(map(tuple, rows)) & set(map(tuple, other))


@BLOCKS
@EVERY
def test_prompts_stay_and_only_clean_tokens_are_left(model, case, block_size):
    family = family_of(case, block_size)
    job = Job(PROMPTS, NEW, seed=1)
    steps = walk(model, family, job)
    for step in steps:
        for row, prompt in enumerate(PROMPTS):
            assert step.canvas[row, : len(prompt)].tolist() == prompt
        assert not torch.isin(step.canvas, torch.tensor(EXCLUDED)).any()
    for row, length in enumerate(job.lengths.tolist()):
        assert torch.isin(steps[-1].canvas[row, :length], torch.tensor(CLEAN)).all()


@EVERY
def test_a_block_is_finished_before_the_next_one_moves(model, case):
    family = family_of(case, 4)
    job = Job([[], [CLEAN[1]] * 2], [12, 10], seed=2)
    before, last = None, 0
    for step in walk(model, family, job):
        where = (step.changed % 12 // 4).unique().tolist()
        assert len(where) <= 1
        if before is not None:
            moved = (step.canvas != before).any(0).nonzero().flatten()
            assert (moved // 4).unique().tolist() == where
        last, before = (where or [last])[0], step.canvas
        assert last <= (step.calls - 1) // 5
    assert last == 2
