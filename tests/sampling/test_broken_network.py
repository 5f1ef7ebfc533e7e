"""A network whose output is not a number: a sentence, never a text."""

from dataclasses import replace

import pytest
import torch
from engines import generate
from tiny_models import CLEAN, MASK, tiny_family, tiny_model

from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.errors import CheckpointError, TextDiffError
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import _column, _with_weight, inverse_cdf
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor


def broken_model(value: float, row: int, **settings):
    model = tiny_model(**settings)
    with torch.no_grad():
        model.output_layer.linear.weight[row] = value
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("block_size", "cache"), [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("kind", ["mdlm", "sedd"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])  # the largest of NaN would be a token
def test_it_is_refused_at_the_first_call(value, block_size, cache, kind, temperature):
    model, family = broken_model(value, CLEAN[2]), tiny_family(block_size)
    family = replace(family, objective=OBJECTIVES.build(kind).on(family.process))
    walk = generate(
        model,
        family,
        Job([[], [0]], [8, 7]),
        rule="ancestral",
        steps=4,
        controls=Controls(temperature=temperature),
        cache=cache,
    )
    with pytest.raises(CheckpointError, match="weights are damaged") as error:
        list(walk)
    assert error.value.code == "output_not_finite"


def test_what_is_never_predicted_may_be_anything():
    model, family = broken_model(torch.nan, MASK), tiny_family()
    walk = generate(model, family, Job([[]], [8]), rule="ancestral", steps=4, controls=Controls())
    *_, last = walk
    assert set(last.canvas[0].tolist()) <= set(CLEAN)


def test_elsewhere_than_on_a_cpu_it_is_noticed_when_asked():
    """There a look at every call would wait for the device: draws stay in the vocabulary."""
    weights = torch.full((3, 5), torch.nan, dtype=torch.float64)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert _with_weight(_column(weights, u)[0], weights).max() < 5
    with pytest.raises(TextDiffError) as error:
        inverse_cdf(weights, u)
    assert error.value.code == "no_token_to_draw"
    denoise = PlainPredictor(tiny_model(), tiny_family())
    denoise.check()
    denoise._broken = torch.ones((), dtype=torch.bool)
    with pytest.raises(CheckpointError) as error:
        denoise.check()
    assert error.value.code == "output_not_finite"
