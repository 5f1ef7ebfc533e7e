"""Identity 28 for the other objectives: a document's nats do not depend on padding or company."""

import pytest
import torch
from test_masked_count_invariance import LENGTHS, WINDOW, documents, windows_of
from tiny_models import EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.likelihood.replicates import estimate

CASES = {
    "udlm": ("uniform", {"kind": "udlm"}),
    "sedd-uniform": ("uniform", {"kind": "sedd"}),
    "sedd-absorbing": ("absorbing", {"kind": "sedd"}),
    "gidd": ("hybrid", {"kind": "gidd"}),
    "d3pm-uniform": ("uniform", {"kind": "d3pm"}),
    "d3pm-uniform-plugged": ("uniform", {"kind": "d3pm", "parameterization": "plugged"}),
    "d3pm-absorbing-plugged": ("absorbing", {"kind": "d3pm", "parameterization": "plugged"}),
}
BLOCKS = pytest.mark.parametrize("block_size", [None, 3], ids=["full", "blocks"])
EVERY = pytest.mark.parametrize("case", CASES)


def family_of(case: str, block_size: int | None, schedule: dict | None = None) -> Family:
    process, objective = CASES[case]
    own = {"kind": "hybrid" if process == "hybrid" else "loglinear"}
    spec = {
        "process": process,
        "schedule": schedule or own,
        "objective": objective,
        "block_size": block_size,
        "timesteps": 6 if objective["kind"] == "d3pm" else None,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


def nats(model, family: Family, windows, **options) -> torch.Tensor:
    return estimate(model, family, windows, seed=5, **options).nats


@BLOCKS
@EVERY
def test_batch_size_and_padding_do_not_matter(model, case, block_size):
    family = family_of(case, block_size)
    windows = windows_of(documents(), family)
    together = nats(model, family, windows)
    assert together.shape == (8, len(LENGTHS))
    assert together.std(0).min() > 1e-3
    single = nats(model, family, windows, batch_tokens=1)  # one window a call
    assert (single - together).abs().max() < 1e-9


@BLOCKS
@EVERY
def test_company_does_not_matter(model, case, block_size):
    family, (short, *others) = family_of(case, block_size), documents()
    texts = [others[0], short, *others[1:]]  # the first of several windows, the last cut short
    together = nats(model, family, windows_of(texts, family))
    alone = nats(model, family, windows_of(texts[:1], family))
    alone = alone[: len(together)]  # a text of a few tokens has more replicates
    assert (together[:, :1] - alone).abs().max() < 1e-9
    changed = [texts[0], *(text.flip(0) for text in texts[1:])]
    others = nats(model, family, windows_of(changed, family))
    assert (others[:, :1] - alone).abs().max() < 1e-9
    assert (others[:, 1:] - together[:, 1:]).abs().max() > 1e-3


@EVERY
def test_shards_add_up(model, case):
    family = family_of(case, None)
    windows = windows_of(documents(), family)
    whole = nats(model, family, windows)
    parts = [nats(model, family, windows, shard=(rank, 3)) for rank in range(3)]
    assert (sum(parts) - whole).abs().max() < 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case != "gidd"])  # its ends are ideal
def test_ends_of_time_do_not_see_padding_either(model, case):
    """A schedule that starts and ends short of clean and of noise has all three parts."""
    schedule = {"kind": "geometric", "sigma_min": 0.1, "sigma_max": 3.0}
    family = family_of(case, None, schedule)
    windows = windows_of(documents(), family)
    name = "finite_t" if family.timesteps else "time"
    together = estimate(model, family, windows, seed=5, estimator=name)
    single = estimate(model, family, windows, seed=5, estimator=name, batch_tokens=1)
    assert together.parts["reconstruction"].max() > 0.1
    for part, value in together.parts.items():
        assert (single.parts[part] - value).abs().max() < 1e-9
    prior = together.parts["prior"]
    assert (prior > 0).all() == (CASES[case][0] == "uniform")
    per_token = prior / torch.tensor(LENGTHS)
    assert (per_token - per_token[0, 0]).abs().max() < 1e-12


@EVERY
def test_nats_of_tokens_belong_to_their_windows(model, case):
    family = family_of(case, 3)
    windows = windows_of(documents(), family)
    found = estimate(model, family, windows, seed=5, attribute=True)
    sums = torch.zeros(len(LENGTHS), dtype=torch.float64)
    for tokens, document in zip(found.token_nats(), windows.document.tolist(), strict=True):
        assert 0 < len(tokens) <= WINDOW
        sums[document] += tokens.sum()
    assert (sums - found.nats.mean(0)).abs().max() < 1e-9
