"""Every rule inside the block loop: with and without a cache, in any company, at any block size."""

import pytest
from engines import generate
from tiny_models import CLEAN, MASK, ROWS, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

PROMPTS = [[], [0, 5, 2], [1, 1, 8, 7, 3], [6], [2, 0, 3, 3, 5, 6, 7, 8, 0]]
NEW = [6, 4, 7, 16 - 1, 2]
SEDD = ("sedd", "absorbing", "loglinear")
CASES = [
    *[(*SEDD, rule) for rule in ("first_hitting", "euler", "tweedie", "confidence")],
    *[(*SEDD, rule) for rule in ("threshold", "entropy_bound", "remask")],
    ("sedd", "uniform", "loglinear", "euler"),
    ("sedd", "uniform", "loglinear", "tweedie"),
    ("gidd", "hybrid", "hybrid", "predictor_corrector"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


@pytest.mark.parametrize(
    ("kind", "process", "schedule", "rule"), CASES, ids=[f"{c[1]}-{c[3]}" for c in CASES]
)
@pytest.mark.parametrize("block_size", [None, 4, 1])
def test_rows_depend_on_nothing_but_themselves(model, kind, process, schedule, rule, block_size):
    spec = {
        "process": process,
        "schedule": {"kind": schedule},
        "objective": {"kind": kind},
        "block_size": block_size,
        "timesteps": None,
    }
    family = build_family(spec, Vocabulary.of(ROWS, MASK, [9, 10]))

    def rows(job: Job, cache: bool = False, slots: int | None = None) -> list[list[int]]:
        walk = generate(
            model,
            family,
            job,
            rule=rule,
            steps=2 if block_size == 1 else 3,
            controls=Controls(),
            cache=cache,
            slots=slots,
        )
        *_, last = walk
        return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]

    job = Job(PROMPTS, NEW, seed=3)
    together = rows(job)
    for prompt, new, row in zip(PROMPTS, NEW, together, strict=True):
        assert row[: len(prompt)] == prompt
        assert len(row) == len(prompt) + new
        assert set(row) <= set(CLEAN)
    for index in (0, 4):
        one = Job([PROMPTS[index]], [NEW[index]], first_row=index, seed=3)
        assert rows(one)[0] == together[index]
    assert rows(job, slots=2) == together
    if block_size is not None:
        assert rows(job, cache=True) == together
    assert rows(Job(PROMPTS[3:4], NEW[3:4], first_row=3, seed=4)) != together[3:4]
