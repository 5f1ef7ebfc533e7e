"""A cache of full canvases: exact where it can be, and else what its definition says."""

from dataclasses import replace

import pytest
import torch
from engines import alone, generate
from test_rules import FITS, family_of
from tiny_models import CLEAN, CONTEXT, MASK, tiny_family, tiny_model

from textdiff.errors import ConfigError
from textdiff.models import block
from textdiff.sampling.cached import ApproximatePredictor
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

A, B = CLEAN[1], CLEAN[3]
PROMPTS = [[A, None, B, None, None, A], [B] * 6, [None] * 5 + [A] * 3 + [None], [A, B]]
NEW = [3, 5, 2, 14]
CLEAN_IDS = list(CLEAN)

CANVAS = torch.tensor(
    [
        [A, B, A, MASK, MASK, MASK, MASK, MASK],
        [MASK, A, MASK, MASK, B, 0, 0, 0],  # five places, and padding
        [A, A, A, A, A, A, MASK, MASK],
    ]
)
WIDTHS = torch.tensor([8, 5, 8])
PADDING = torch.arange(8) >= WIDTHS[:, None]
FROZEN = (CANVAS != MASK) | PADDING
OPEN = (~FROZEN).flatten().nonzero().squeeze(1)
T = torch.tensor([1.0, 0.9, 0.7], dtype=torch.float64)


@pytest.fixture(scope="module", params=["time-free", "time-conditioned", "eager"])
def model(request):
    if request.param == "eager":
        return tiny_model(attn_implementation="eager")
    told = request.param == "time-conditioned"
    return tiny_model(adaln=told, time_conditioning=told)


@pytest.fixture(scope="module")
def shallow():
    """One layer, whose keys and values have seen nothing: there the approximation is none."""
    model = tiny_model()
    del model.blocks[1]
    model.config.num_hidden_layers = 1
    return model


def entered(model, family, canvas=CANVAS, widths=WIDTHS, frozen=FROZEN) -> ApproximatePredictor:
    found = ApproximatePredictor(model, family, len(canvas), canvas.shape[1])
    found.enter(canvas, 0 * widths, widths, frozen)
    return found


def law(denoise, canvas, t=T, positions=OPEN):
    with torch.no_grad():
        return denoise(canvas, t, positions).log_x0[:, CLEAN_IDS]


def further(canvas=CANVAS):
    """A canvas with one more token in every row, and what is open of it."""
    canvas = canvas.clone()
    for row, column in ((0, 4), (1, 2), (2, 7)):
        canvas[row, column] = B
    return canvas, ((canvas == MASK) & ~PADDING).flatten().nonzero().squeeze(1)


def rows_of(model, family, job, rule="ancestral", **options):
    controls = Controls(temperature=1.5)
    *_, last = generate(model, family, job, rule=rule, steps=3, controls=controls, **options)
    return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("shift", [False, True])
def test_the_first_call_of_a_segment_is_exact(model, shift):
    family = tiny_family(shift=shift)
    held, plain = entered(model, family), alone(model, family, WIDTHS)
    torch.testing.assert_close(law(held, CANVAS), law(plain, CANVAS), rtol=0, atol=1e-12)
    canvas, left = further()
    assert (law(held, canvas, T / 2, left) - law(plain, canvas, T / 2, left)).abs().max() > 1e-3
    held.enter(canvas, 0 * WIDTHS, WIDTHS, (canvas != MASK) | PADDING)
    torch.testing.assert_close(
        law(held, canvas, T / 2, left), law(plain, canvas, T / 2, left), rtol=0, atol=1e-12
    )


def test_later_calls_see_what_is_final_as_the_first_call_did(model, monkeypatch):
    """By hand: whole canvases, in whose attention the keys and values of the first are put back."""
    family = tiny_family()
    held, plain = entered(model, family), alone(model, family, WIDTHS)
    canvas, left = further()
    law(held, CANVAS)
    found = law(held, canvas, T / 2, left)
    attend, first = block.attend, {}

    def with_old(attention, q, k, v, layer):
        old = first.setdefault(layer, (k, v))
        final = FROZEN[:, None, :, None]
        k, v = (torch.where(final, x, y) for x, y in zip(old, (k, v), strict=True))
        return attend(attention, q, k, v, layer)

    monkeypatch.setattr(block, "attend", with_old)
    law(plain, CANVAS)
    torch.testing.assert_close(found, law(plain, canvas, T / 2, left), rtol=0, atol=1e-12)


def test_rows_may_make_their_first_calls_at_different_times(model):
    held, (canvas, left) = entered(model, tiny_family()), further()
    together = entered(model, tiny_family())
    law(together, CANVAS)
    expected = law(together, canvas, T / 2, left)
    law(held, CANVAS, positions=OPEN[OPEN < 16])
    mixed = law(held, torch.where(torch.arange(3)[:, None] < 2, canvas, CANVAS), T, OPEN[-6:])
    assert held.calls == 3  # row 0 and 1; then row 1 and, apart from it, row 2
    assert len(mixed) == 6
    torch.testing.assert_close(law(held, canvas, T / 2, left), expected, rtol=0, atol=1e-12)


def test_it_runs_on_the_open_positions_alone(model, monkeypatch):
    sizes, run = [], ApproximatePredictor._logits

    def counting(self, tokens, *rest, **options):
        sizes.append(tuple(tokens.shape))
        return run(self, tokens, *rest, **options)

    monkeypatch.setattr(ApproximatePredictor, "_logits", counting)
    held, (canvas, left) = entered(model, tiny_family()), further()
    law(held, CANVAS)
    law(held, canvas, T / 2, left)
    law(held, canvas, T / 3, left[left >= 16])
    assert sizes == [(3, 8), (3, 5), (1, 2)]


@pytest.mark.parametrize("case", ["mdlm", "udlm"])
def test_where_nothing_is_given_every_call_is_exact(model, case):
    job = Job([[]] * 3, [CONTEXT, 7, 12], seed=2)
    plain = rows_of(model, family_of(case), job)
    assert rows_of(model, family_of(case), job, cache="approximate", slots=2) == plain


CASES = [(case, rule) for case in FITS for rule in sorted(FITS[case])]


@pytest.mark.parametrize(("case", "rule"), CASES)
def test_every_rule_is_exact_on_a_network_whose_stored_part_sees_nothing(shallow, case, rule):
    """Also beyond the context, with holes and with guidance."""
    family, long = family_of(case), [*NEW[:3], CONTEXT + 9]
    for new in (NEW, long):
        plain = rows_of(shallow, family, Job(PROMPTS, new, seed=5), rule)
        job = Job(PROMPTS, new, seed=5)
        assert rows_of(shallow, family, job, rule, cache="approximate", slots=3) == plain
    if family.process.has_mask:
        plain = rows_of(shallow, family, job, rule, guidance=1.5)
        assert rows_of(shallow, family, job, rule, guidance=1.5, cache="approximate") == plain


@pytest.mark.parametrize("case", ["mdlm", "udlm", "gidd"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_row_does_not_depend_on_its_batch(model, case, guidance):
    family = replace(family_of(case), hides_prompts=True)
    options = {"guidance": guidance, "cache": "approximate"}
    for new in (NEW, [*NEW[:3], CONTEXT + 9]):  # within the context, and one beyond it
        job = Job(PROMPTS, new, seed=5)
        together = rows_of(model, family, job, **options)
        assert rows_of(model, family, job, slots=2, **options) == together
        for row in range(len(PROMPTS)):
            one = Job(PROMPTS[row : row + 1], new[row : row + 1], first_row=row, seed=5)
            assert rows_of(model, family, one, **options) == together[row : row + 1]
        for prompt, now in zip(PROMPTS, together, strict=True):
            given = [token for token in prompt if token is not None]
            assert given == [now[i] for i, token in enumerate(prompt) if token is not None]


def test_models_in_blocks_have_an_exact_one(model):
    with pytest.raises(ConfigError) as error:
        rows_of(model, tiny_family(4), Job([[]], [4]), cache="approximate")
    assert error.value.code == "cache_is_exact"


def test_the_refusal_of_an_exact_one_names_it(model):
    with pytest.raises(ConfigError) as error:
        rows_of(model, tiny_family(), Job([[]], [4]), cache=True)
    assert error.value.code == "cache_not_exact"


def test_a_misspelt_one_is_refused(model):
    with pytest.raises(ConfigError) as error:
        rows_of(model, tiny_family(), Job([[]], [4]), cache="approx")
    assert error.value.code == "literal_error"
