"""The pieces of the forecasting estimator that its expectation rests on."""

import pytest
import torch
from exact_tables import TableDenoiser, all_sequences, family, random_table

from textdiff.likelihood.estimators import balanced
from textdiff.likelihood.estimators.balanced import densities, hats
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows

SIZES = torch.tensor([0, 1, 2, 3, 7, 20, 128])


def test_counts_have_a_distribution_on_one_to_n():
    p = densities(SIZES)
    assert torch.allclose(p.sum(1)[1:], torch.ones(6).double())
    assert p[0].sum() == 0.0
    for row, n in zip(p, SIZES.tolist(), strict=True):
        assert (row[1 : n + 1] > 0).all()
        assert row[0] == 0.0
        assert (row[n + 1 :] == 0).all()
    assert (p[-1, 1:-1] > p[-1, 2:]).all()  # fewer masked tokens vary more


def test_forecasts_interpolate_and_add_up():
    weights = hats(SIZES)
    for row, n in zip(weights, SIZES.tolist(), strict=True):
        assert torch.allclose(row[1 : n + 1].sum(-1), torch.ones(n).double())
        assert (row[n + 1 :] == 0).all()
        assert (row >= 0).all()
    assert torch.allclose(weights[-1, 128], torch.tensor([0.0, 0.0, 1.0]).double())
    assert torch.allclose(weights[-1, 64], torch.tensor([0.0, 1.0, 0.0]).double())
    assert torch.allclose(weights[-1, 8], torch.tensor([1.0, 0.0, 0.0]).double())
    assert torch.allclose(weights[-1, 96], torch.tensor([0.0, 0.5, 0.5]).double())


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_any_forecast_leaves_the_expectation_alone(monkeypatch, shift):
    """A forecast that is off by a constant costs variance and no bias."""
    original = balanced.Balanced.learn
    monkeypatch.setattr(
        balanced.Balanced,
        "learn",
        lambda *given: original(*given) + shift * given[1].scorable[:, None],
    )
    table = random_table(3)
    texts = all_sequences()[::5].repeat_interleave(200, 0)
    clean = family().process.vocabulary.clean
    windows = cut_windows(
        [x.to(torch.int32).numpy() for x in texts], ["abc"] * len(texts), 3, clean
    )
    found = estimate(
        TableDenoiser(table), family(), windows, estimator="balanced", samples=2, seed=0
    ).bound()
    exact = sum(table.nelbo(x) for x in texts[::200]) / len(texts[::200]) / 3
    assert abs(found.mean - exact) < 4 * found.stderr
    assert found.stderr < 0.05
