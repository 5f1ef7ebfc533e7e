"""Skewed draws: intervals that reach further, and none where the draws cannot show their tail."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_family, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError
from textdiff.likelihood.bound import (
    LARGEST,
    LARGEST_WHEN_WORSE,
    MANY_DRAWS,
    WORSE,
    Bound,
    Tail,
    mean_skewness,
    skewed_ends,
    student_t_quantile,
)
from textdiff.likelihood.difference import compare
from textdiff.likelihood.estimates import Estimates
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows


def windows_of(lengths=(4,), stride=None):
    generator = torch.Generator().manual_seed(1)
    texts = [
        torch.tensor(CLEAN)[torch.randint(len(CLEAN), (n,), generator=generator)] for n in lengths
    ]
    arrays = [text.to(torch.int32).numpy() for text in texts]
    clean = tiny_family().process.vocabulary.clean
    return cut_windows(arrays, ["abcd"] * len(arrays), 4, clean, stride=stride)


def estimates(nats: torch.Tensor, **options) -> Estimates:
    return Estimates({"diffusion": nats}, windows_of((4,) * nats.shape[1]), **options)


# --- the statistic -------------------------------------------------------------------------------


def test_skewness_is_that_of_a_mean_of_independent_cells():
    """Cells of two values, whose cumulants are known: added up, over the root of the replicates."""
    generator = torch.Generator().manual_seed(0)
    chance, sizes, replicates = 0.1, torch.tensor([1.0, 3.0, 2.0]), 40_000
    hit = (torch.rand(replicates, 3, generator=generator, dtype=torch.float64) < chance).double()
    second = chance * (1 - chance) * float(sizes.square().sum())
    third = chance * (1 - chance) * (1 - 2 * chance) * float(sizes.pow(3).sum())
    exact = third / second**1.5
    found = mean_skewness(hit * sizes.double())
    assert found * math.sqrt(replicates) == pytest.approx(exact, rel=0.05)
    assert mean_skewness(hit * sizes.double(), 25) == pytest.approx(exact / 5, rel=0.05)
    assert mean_skewness(-hit * sizes.double(), 25) == pytest.approx(-exact / 5, rel=0.05)


def test_skewness_of_few_or_equal_values_is_none():
    assert mean_skewness(torch.tensor([[1.0], [2.0], [9.0]])) == 0.0
    assert mean_skewness(torch.full((9, 2), 0.1, dtype=torch.float64)) == 0.0
    assert mean_skewness(torch.full((9, 1), 1e5) + 1e-9 * torch.randn(9, 1).double()) == 0.0


def test_cumulants_of_cells_are_unbiased_for_few_replicates():
    """All 5-tuples of a three-valued variable: the mean third cumulant is the exact one."""
    values = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    samples = torch.cartesian_prod(*[values] * 5).T  # [5, 243]
    away = samples - samples.mean(0)
    third = away.pow(3).sum(0) * 5 / (4 * 3)
    exact = (values - values.mean()).pow(3).mean()
    assert float(third.mean()) == pytest.approx(float(exact), rel=1e-12)
    one = samples[:, 17:18]
    second = float(one.var(0))
    assert mean_skewness(one) == pytest.approx(float(third[17]) / second**1.5 / math.sqrt(5))


def test_the_corrected_interval_inverts_the_transformation():
    for quantile in (1.96, 2.36):
        for skewness in (0.05, 0.2, 0.4):
            below, above = skewed_ends(quantile, skewness)
            ratio = -above  # g(T) = T + s T^2 / 3 + s^2 T^3 / 27 + s / 6
            g = ratio + skewness * ratio**2 / 3 + skewness**2 * ratio**3 / 27 + skewness / 6
            assert g == pytest.approx(-quantile, abs=1e-9)
            assert below == quantile < above
            assert skewed_ends(quantile, -skewness) == (above, below)
    assert skewed_ends(2.0, 0.0) == (2.0, 2.0)
    assert skewed_ends(2.0, 9.0) == skewed_ends(2.0, 0.4)


# --- what follows from it ------------------------------------------------------------------------


def test_a_bound_without_skewness_has_the_interval_of_student():
    even = torch.tensor([[-3.0, -1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 3.0]], dtype=torch.float64).T + 10.0
    bound = estimates(even).bound()
    assert bound.skewness == pytest.approx(0.0, abs=1e-12)
    low, high = bound.interval()
    width = student_t_quantile(0.975, 7) * bound.stderr
    assert (low, high) == pytest.approx((bound.mean - width, bound.mean + width), abs=1e-12)


def test_a_draw_that_carries_the_spread_leaves_no_interval():
    light = torch.rand(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert estimates(light).bound().is_reliable
    heavy = light.clone()
    heavy[5] = 60.0
    bound = estimates(heavy).bound()
    assert bound.skewness > LARGEST
    assert not bound.is_reliable
    assert all(math.isnan(end) for end in bound.interval())
    assert "replicates" in bound.doubt
    record = json.loads(json.dumps(bound.to_dict(), allow_nan=False))
    assert record["stderr"] is None
    assert record["interval_95"] == record["perplexity_interval_95"] == [None, None]
    assert (record["is_reliable"], record["mean"]) == (False, bound.mean)


@pytest.mark.parametrize("relative", [WORSE * 0.99, WORSE * 1.01])
@pytest.mark.parametrize("draws", [MANY_DRAWS - 1, MANY_DRAWS])
def test_networks_worse_than_guessing_need_many_draws(relative, draws):
    tail = Tail(0.1, draws, 32, relative)
    assert bool(tail.doubt) == (relative > WORSE and draws < MANY_DRAWS)
    between = (LARGEST + LARGEST_WHEN_WORSE) / 2
    assert bool(Tail(between, draws, 32, relative).doubt) == (relative > WORSE)
    assert not Tail(between, draws, 32).doubt  # costs that are cross-entropies


def test_the_number_of_replicates_asked_for_is_enough():
    tail = Tail(0.1, 80, 8, 3.0)
    needed = int(tail.doubt.split("at least ")[1].split()[0])
    assert needed == 410
    assert not Tail(0.1, 10 * needed, needed, 3.0).doubt


def test_windows_of_a_document_are_cells(monkeypatch):
    """One document in three windows: its interval knows each of them."""
    found = estimate(tiny_model(), tiny_family(), windows_of((11, 3)), seed=1)
    assert found.spread.shape == (len(found.nats), 4)
    assert torch.allclose(found.spread[:, :3].sum(1), found.nats[:, 0], atol=1e-12)
    assert torch.equal(found.cells(slice(0, 1)), found.spread[:, :3])
    assert found.draws.tolist() == [6, 2]
    document = found.document(0)
    assert document.skewness == mean_skewness(found.spread[:, :3])
    assert document.skewness != mean_skewness(found.nats[:, :1])


def test_a_pilot_is_in_doubt_as_its_spread_is():
    """The spread is that of the pilot: the tail counts for its number, over all draws there are."""
    light = torch.rand(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heavy = light.clone()
    heavy[7] = 90.0
    pilot = light[:16, 0]
    quiet = estimates(light, pilot=pilot, pilot_spread=pilot[:, None]).bound()
    assert quiet.is_reliable
    assert quiet.skewness == 0.0
    assert not estimates(heavy, pilot=pilot, pilot_spread=pilot[:, None]).bound().is_reliable


# --- models --------------------------------------------------------------------------------------


def sedd(timesteps=None):
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "sedd"},
        "block_size": None,
        "timesteps": timesteps,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


def test_scores_far_from_normalised_leave_no_interval_and_cross_entropies_do():
    model, windows = tiny_model(adaln=True, time_conditioning=True), windows_of((4, 3, 4, 2))
    bad = estimate(model, sedd(), windows, seed=0)
    assert bad.guess == math.log(len(CLEAN))
    assert bad.bound().mean > WORSE * bad.guess
    assert not bad.bound().is_reliable
    assert not any(bad.document(index).is_reliable for index in range(4))
    good = estimate(model, tiny_family(), windows, seed=0)
    assert good.guess == 0.0
    assert good.bound().is_reliable
    twice = compare(good, bad)
    assert not twice.is_reliable
    assert math.isnan(twice.interval()[0])
    same = compare(good, good)
    assert same.interval() == (0.0, 0.0)


def test_a_difference_has_tails_of_its_own():
    base = torch.rand(32, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 50
    other = base.clone()
    other[3] += 20.0  # hidden in either spread, and all there is of their difference
    a, b = estimates(base), estimates(other)
    assert a.bound().is_reliable
    assert b.bound().is_reliable
    assert not compare(a, b).is_reliable


def test_processes_and_interruptions_agree_on_doubt(tmp_path):
    model, windows = tiny_model(), windows_of((11, 3, 4))
    whole = estimate(model, tiny_family(), windows, seed=1)
    parts = [estimate(model, tiny_family(), windows, seed=1, shard=(r, 2)) for r in range(2)]
    assert torch.allclose(sum(p.spread for p in parts), whole.spread, atol=1e-9)
    path = tmp_path / "state"
    estimate(model, tiny_family(), windows, seed=1, state=path)
    again = estimate(model, tiny_family(), windows, seed=1, state=path)
    assert (again.rows, again.bound()) == (0, whole.bound())


def test_a_state_without_windows_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model, windows, path = tiny_model(), windows_of((11,)), tmp_path / "state"
    estimate(model, tiny_family(), windows, seed=1, state=path)
    with safe_open(path, "pt") as file:
        said = {k: v for k, v in file.metadata().items() if k != "layout"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=said)
    with pytest.raises(CheckpointError) as error:
        estimate(model, tiny_family(), windows, seed=1, state=path)
    assert error.value.code == "saved_with_another_layout"


def test_defaults_leave_a_bound_as_it_was():
    plain = Bound(2.0, 0.1, None, 3, 3, 1, "masked_count", 8)
    assert plain.is_reliable
    assert np.mean(plain.interval()) == pytest.approx(2.0)
