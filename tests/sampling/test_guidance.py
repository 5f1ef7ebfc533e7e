"""Guidance: two networks' log-probabilities, mixed; every call counted; cached and alone alike."""

from dataclasses import replace

import pytest
import torch
from engines import alone, generate
from test_rules import FITS, family_of
from tiny_models import CLEAN, MASK, tiny_family, tiny_model

from textdiff.diffusion.objectives import Prediction
from textdiff.errors import ConfigError
from textdiff.sampling.cached import CachedPredictor
from textdiff.sampling.controls import Controls
from textdiff.sampling.guidance import GuidedPrediction, GuidedPredictor, mix
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor

A, B = CLEAN[1], CLEAN[3]
PROMPTS = [[A, None, B, None, None, A], [B] * 6, [None] * 5 + [A] * 3 + [None], [A, B]]
NEW = [3, 5, 2, 7]


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def rows_of(model, family, job, rule="ancestral", **options):
    controls = Controls(temperature=1.5)
    *_, last = generate(model, family, job, rule=rule, steps=3, controls=controls, **options)
    return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]


def test_log_probabilities_are_mixed_as_the_equation_says():
    conditional = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    unconditional = torch.tensor([[0.4, 0.4, 0.2, 0.0], [0.0, 0.0, 0.5, 0.5]], dtype=torch.float64)
    found = mix(conditional.log(), unconditional.log(), 0.5).exp()
    expected = conditional[0] ** 1.5 / unconditional[0].clamp(min=1e-9) ** 0.5
    assert (found[0] - expected / expected.sum()).abs().max() < 1e-12
    assert found[1].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])  # nothing in common
    assert (
        mix(conditional[:1].log(), unconditional[:1].log(), 0.0).exp() - conditional[:1]
    ).abs().max() < 1e-12
    assert (
        mix(conditional[:1].log(), unconditional[:1].log(), -1.0).exp() - unconditional[:1]
    ).abs().max() < 1e-12


def test_how_fast_masks_are_revealed_is_not_guided():
    """A mask's summed scores stay those of the network that knows the prompt."""
    generator = torch.Generator().manual_seed(0)
    scores = 2.0 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    conditional, unconditional = (Prediction(score.log_softmax(-1), score) for score in scores)
    found = GuidedPrediction.of(conditional, unconditional, 1.5)
    assert (found.log_score.logsumexp(-1) - scores[0].logsumexp(-1)).abs().max() < 1e-12
    assert (found.log_score.log_softmax(-1) - found.log_x0).abs().max() < 1e-12


def test_the_one_that_is_not_told_sees_masks(model):
    """By hand: the network on the canvas, and on the canvas with its given tokens masked."""
    family = tiny_family()
    given = torch.tensor([[True, False, True, False]])
    guided = GuidedPredictor(
        PlainPredictor(model, family), PlainPredictor(model, family), given, 2.0
    )
    canvas, t = torch.tensor([[A, MASK, B, CLEAN[5]]]), torch.tensor([0.4]).double()
    width = torch.tensor([4])
    guided.admit(canvas, torch.tensor([1]))
    guided.enter(canvas, torch.tensor([0]), width, canvas != MASK)
    found = guided(canvas, t, torch.tensor([1])).log_x0
    plain = alone(model, family, width)
    conditional = plain(canvas, t, torch.tensor([1])).log_x0
    bare = torch.tensor([[MASK, MASK, MASK, CLEAN[5]]])
    unconditional = plain(bare, t, torch.tensor([1])).log_x0
    clean = list(CLEAN)
    expected = (unconditional + 3.0 * (conditional - unconditional))[:, clean].log_softmax(-1)
    assert (found[:, clean] - expected).abs().max() < 1e-12
    assert guided.calls == 2


def test_blocks_before_the_first_hole_are_not_there_for_it(model):
    """Ignoring all that is given is writing from nothing, if whole blocks are given."""
    family = tiny_family(4)
    conditional, bare = Job([[A] * 8], [8], seed=4), Job([[]], [8], seed=4)
    plain = rows_of(model, family, conditional)[0][8:]
    unguided = rows_of(model, family, conditional, guidance=-1.0)[0][8:]
    assert unguided != plain
    assert len({*map(tuple, (rows_of(model, family, bare)[0], unguided))}) == 2  # other numbers
    greedy = [
        [*generate(model, family, job, rule="ancestral", steps=1, guidance=w, controls=cold)][-1]
        for job, w in ((conditional, -1.0), (bare, 0.0))
        for cold in [Controls(temperature=0.0)]
    ]
    assert torch.equal(greedy[0].canvas[0, 8:], greedy[1].canvas[0])


@pytest.mark.parametrize("cache", [False, True])
def test_what_it_predicts_behind_hidden_blocks_is_what_a_text_of_its_own_has(model, cache):
    """Two given blocks and half of one: it sees a text that begins at the third, half masked."""
    family, count = tiny_family(4), 11
    conditional = [A, B, CLEAN[5], A, B, B, A, CLEAN[0], A, B]
    bare = [MASK, MASK]  # of the third block, which holds the first hole
    job = Job([conditional], [6])

    def predictor():
        return (
            CachedPredictor(model, family, 1, 16, None) if cache else PlainPredictor(model, family)
        )

    guided = GuidedPredictor(predictor(), predictor(), job.given, -1.0)
    plain = PlainPredictor(model, family)
    text = torch.tensor([conditional + [MASK] * 6])
    own = torch.tensor([bare + [MASK] * 6])
    guided.admit(text, torch.tensor([10]))
    plain.admit(own, torch.tensor([0]))
    width, t = torch.tensor([4]), torch.tensor([0.4]).double()
    for block, known in ((8, [A, B]), (12, [])):
        canvas = torch.tensor([known + [CLEAN[count % 4]] + [MASK] * (3 - len(known))])
        frozen = canvas != MASK
        assert guided.unconditional.calls == (block > 8)  # nothing is stored of blocks left out
        guided.enter(text, torch.tensor([block]), width, frozen)
        plain.enter(own, torch.tensor([block - 8]), width, frozen)
        hidden = torch.tensor([[MASK] * len(known) + canvas[0, len(known) :].tolist()])
        at = torch.tensor([2, 3])
        found, expected = guided(canvas, t, at).log_x0, plain(hidden, t, at).log_x0
        clean = list(CLEAN)
        assert (found - expected)[:, clean].abs().max() < 1e-10
        text[0, block : block + 4] = own[0, block - 8 : block - 4] = canvas[0].where(frozen[0], A)
        own[0, : len(known)] = MASK


CASES = [(case, rule) for case in ("mdlm", "gidd") for rule in sorted(FITS[case])]
CASES += [("sedd", "euler"), ("sedd", "tweedie"), ("learned", "ancestral")]
CASES += [("udlm", "ancestral"), ("udlm", "predictor_corrector"), ("sedd-uniform", "tweedie")]


@pytest.mark.parametrize(("case", "rule"), CASES)
def test_guided_rows_are_the_same_in_any_batch(model, case, rule):
    job = Job(PROMPTS, NEW, seed=5)
    for size in (None, 4):
        family = replace(family_of(case), block_size=size, hides_prompts=True)
        together = rows_of(model, family, job, rule, guidance=1.5)
        plain = rows_of(model, family, job, rule)
        assert together != plain
        assert rows_of(model, family, job, rule, guidance=0.0) == plain
        for token, now in zip(PROMPTS[0], together[0], strict=False):
            assert token in (None, now)
        one = Job(PROMPTS[2:3], NEW[2:3], first_row=2, seed=5)
        assert rows_of(model, family, one, rule, guidance=1.5) == together[2:3]
        if size is not None:
            cached = rows_of(model, family, job, rule, guidance=1.5, cache=True, slots=2)
            assert cached == together


def test_a_window_is_that_of_both():
    """What one layer stores has seen nothing, so a window is exact in a cache, too."""
    model = tiny_model()
    del model.blocks[1]
    model.config.num_hidden_layers = 1
    family, job = tiny_family(4), Job([[A, B] * 6, [A, None] + [B] * 17 + [None]], [12, 3], seed=1)
    near = rows_of(model, family, job, guidance=1.0, window=8)
    assert rows_of(model, family, job, guidance=1.0, window=8, cache=True) == near
    assert near != rows_of(model, family, job, guidance=3.0, window=8)


def test_every_call_is_counted(model):
    family, job = tiny_family(), Job([[A]], [6])
    plain, guided = (
        list(generate(model, family, job, rule="first_hitting", steps=1, controls=c, guidance=w))
        for w in (0.0, 1.0)
        for c in [Controls()]
    )
    assert [step.calls for step in plain] == [1, 2, 3, 4, 5, 6]
    assert [step.calls for step in guided] == [2, 4, 6, 8, 10, 12]


def test_where_guidance_means_nothing_it_is_refused(model):
    with pytest.raises(ConfigError) as error:
        rows_of(model, family_of("udlm"), Job([[A]], [3]), guidance=1.0)
    assert error.value.code == "guidance_without_mask"
    for weight in (-1.5, float("nan")):
        with pytest.raises(ConfigError) as error:
            rows_of(model, tiny_family(), Job([[A]], [3]), guidance=weight)
        assert error.value.code in ("greater_than_equal", "finite_number")
