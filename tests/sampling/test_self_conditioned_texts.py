"""Generation by networks that read their last prediction: a text depends on its own calls alone."""

import pytest
import torch
from engines import generate
from test_generate_dense import family_of
from tiny_models import CLEAN, tiny_family, tiny_model

from textdiff.sampling.cached import ApproximatePredictor
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor

FREE = Controls(temperature=1.5)
PROMPTS = [[], [CLEAN[3]] * 9, [CLEAN[1], CLEAN[2]], [CLEAN[5]] * 4]
NEW = [17, 6, 1, 12]
JOB = Job(PROMPTS, NEW, seed=5)
GATED = {"adaln": True, "time_conditioning": True}


@pytest.fixture(scope="module")
def model():
    return tiny_model(self_conditioning=True, **GATED)


def rows_of(model, family, job, rule="ancestral", controls=FREE, **options) -> list[list[int]]:
    walk = generate(model, family, job, rule=rule, controls=controls, **{"steps": 4, **options})
    canvas = list(walk)[-1].canvas
    return [row[:n].tolist() for row, n in zip(canvas, job.lengths.tolist(), strict=True)]


def alone(model, family, **options) -> list[list[int]]:
    jobs = [
        Job([prompt], [new], first_row=row, seed=5)
        for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True))
    ]
    return [rows_of(model, family, job, **options)[0] for job in jobs]


@pytest.mark.parametrize("case", ["mdlm", "udlm", "gidd", "sedd-uniform", "d3pm-uniform"])
def test_cached_is_uncached_and_a_batch_is_its_rows(model, case):
    family = tiny_family(4) if case == "mdlm" else family_of(case, 4)
    plain = rows_of(model, family, JOB)
    for slots in (None, 1):
        assert rows_of(model, family, JOB, cache=True, slots=slots) == plain
    assert alone(model, family) == plain
    assert rows_of(model, family, JOB, parts=("draft", "entropy")) == plain
    without = tiny_model(**GATED)
    without.load_state_dict(model.state_dict(), strict=False)
    assert rows_of(without, family, JOB) != plain


@pytest.mark.parametrize("rule", ["confidence", "threshold", "remask"])
@pytest.mark.parametrize("block", [None, 4])
def test_rules_that_revise_or_wait_too(model, rule, block):
    family = tiny_family(block)
    together = rows_of(model, family, JOB, rule)
    assert alone(model, family, rule=rule) == together
    if block:
        assert rows_of(model, family, JOB, rule, cache=True) == together


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("block", [None, 4])
def test_windows_and_guidance(model, guidance, block):
    """Two predictors keep two predictions."""
    family, options = tiny_family(block), {"guidance": guidance, "window": 8 if block else None}
    together = rows_of(model, family, JOB, **options)
    assert alone(model, family, **options) == together
    if block:
        assert rows_of(model, family, JOB, cache=True, **options) == together


def test_an_approximate_cache_is_exact_where_nothing_is_final(model):
    """Its tokens are the open ones alone, in another order of places."""
    family, widths = tiny_family(), torch.tensor([6, 9])
    frozen = torch.zeros(2, 9, dtype=torch.bool)
    frozen[0, 6:] = True
    held = ApproximatePredictor(model, family, 2, 9)
    held.enter(frozen[:, :0].long(), 0 * widths, widths, frozen)
    plain = PlainPredictor(model, family)
    plain.enter(frozen[:, :0].long(), 0 * widths, widths, frozen)
    canvas = torch.full((2, 9), family.process.mask_token_id)
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    at = torch.tensor([0, 3, 10, 17])
    with torch.no_grad():
        for _ in range(3):
            found, wanted = (denoise(canvas, t, at).log_x0 for denoise in (held, plain))
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
