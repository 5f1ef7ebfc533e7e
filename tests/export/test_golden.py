"""Published checkpoints, read by the public way, against what their official codes computed."""

import pytest
from golden import MEASURES, measure
from golden_case import Golden

from textdiff.export.convert.container import read_checkpoint
from textdiff.export.published import read_published


@pytest.mark.parametrize("name", MEASURES)
def test_quantities_are_those_of_the_official_code(name, golden_folder):
    comparisons = measure(golden_folder, name)
    assert any(c.kind == "logits" for c in comparisons)
    assert all(c.entries for c in comparisons)
    far = {c.name: (c.difference, c.tolerance) for c in comparisons if c.difference > c.tolerance}
    assert not far


@pytest.mark.parametrize("name", ["mdlm-lightning", "sedd-checkpoint", "bd3lm-lightning"])
def test_weights_are_the_averaged_ones(name, golden_folder):
    """Logits of the two sets of weights are far apart, so those of the wrong one would show."""
    golden = Golden(golden_folder / name, MEASURES[name][1])
    raw, ema = (
        next(golden[case] for case in golden.cases if case.startswith(kind) and "logits" in case)
        for kind in ("raw/", "ema/")
    )
    assert (raw - ema).abs().max() > 0.3
    assert read_checkpoint(golden_folder / name / MEASURES[name][1]).averaged


FAMILIES = {
    "mdlm-owt": "mdlm",
    "mdlm-noeos": "mdlm",
    "sedd-absorb": "sedd",
    "sedd-noeos": "sedd",
    "bd3lm-owt": "bd3lm",
    "bd3lm-hf-lightning": "bd3lm",
    "ar-owt": "ar",
    "udlm": "udlm",
    "duo": "duo",
    "gidd": "gidd",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_recognised(name, golden_folder):
    assert read_published(golden_folder / name).family.kind == FAMILIES[name]
