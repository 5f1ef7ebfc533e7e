"""Rows dealt out to counts by a pilot: any such allocation is unbiased, and a measured one pays."""

import itertools
from dataclasses import replace

import pytest
import torch
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table
from tiny_models import CLEAN, tiny_family, tiny_model

from textdiff.diffusion import randomness
from textdiff.likelihood.estimators import balanced
from textdiff.likelihood.estimators.balanced import (
    PARTS,
    Balanced,
    allocated,
    densities,
    drawn,
    hats,
    neyman,
    weights,
)
from textdiff.likelihood.replicates import ReplicateDraws
from textdiff.likelihood.scorer import Scorer
from textdiff.likelihood.stopping import EstimateOptions
from textdiff.likelihood.windows import cut_windows

SIZES = torch.tensor([0, 1, 2, 3, 7, 20, 128])


def job(denoiser, chosen, texts, batch_tokens=8192) -> ReplicateDraws:
    length = denoiser.context
    clean = chosen.process.vocabulary.clean
    arrays = [x.to(torch.int32).numpy() for x in texts]
    windows = cut_windows(arrays, ["?"] * len(arrays), length, clean)
    run = EstimateOptions(batch_tokens=batch_tokens)
    return ReplicateDraws(
        Scorer(denoiser, chosen, batch_tokens), windows, Balanced(samples=3), 5, run
    )


def extremes() -> torch.Tensor:
    """[N, PARTS, 1] what pilots may find: one part alone, nothing, everything alike, and noise."""
    noise = torch.randn(200, PARTS, generator=torch.Generator().manual_seed(0)).double().exp()
    rows = torch.cat([torch.eye(PARTS).double() * 1e9, torch.zeros(1, PARTS), torch.ones(1, PARTS)])
    return torch.cat([rows, noise])[..., None]


@pytest.mark.parametrize("blocks", [1, 300])
def test_every_count_keeps_its_chance(blocks):
    missed = extremes().expand(-1, -1, blocks)
    factors = neyman(missed, torch.ones(len(missed), blocks, dtype=torch.bool))
    fixed = densities(SIZES).expand(len(missed), -1, -1)
    p = allocated(fixed, factors[:, None])  # [N, sizes, k + 1]
    assert torch.allclose(p[:, 1:].sum(-1), torch.ones(1, dtype=torch.float64))
    assert (p[:, 0] == 0.0).all()
    assert (p >= fixed / 4).all()  # so that no weight is more than four times as large
    assert (p <= fixed * 4).all()
    assert ((fixed > 0.0) == (p > 0.0)).all()


def test_counts_are_drawn_by_their_chance():
    grid = (torch.arange(40000).double() + 0.5) / 40000
    for size in (1, 3, 20):
        factors = torch.tensor([0.5, 2.0, 1.3, 0.6]).double()
        density = allocated(densities(torch.tensor([size])), factors[None])
        counts = drawn(grid, density.expand(len(grid), -1), torch.full(grid.shape, size))
        found = torch.bincount(counts, minlength=size + 1) / len(grid)
        assert (found - density[0]).abs().max() < 2 / len(grid)
        weight = weights(counts, density.expand(len(grid), -1))
        # Each of n tokens is hit with probability k / n, so its weight is 1 on average.
        assert float((weight * counts).mean()) / size == pytest.approx(1.0, abs=1e-2)


def test_the_pilot_is_followed_as_far_as_it_says_something():
    truth = torch.tensor([1.0, 1.0, 2.0, 4.0]).double()
    signs = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    real = torch.ones(1, len(signs), dtype=torch.bool)
    many = neyman((truth[:, None] * signs)[None], real)[0]
    assert (many[1:] / many[:-1] / (truth[1:] / truth[:-1])).log2().abs().max() <= 0.25 + 1e-9
    one = neyman(truth[None, :, None], real[:, :1])[0]
    assert (one[-1] / one[0]).log2() == pytest.approx(0.25)  # an eighth of the way to two octaves
    half = real.clone()
    half[:, 2000:] = False
    padded = torch.where(half[:, None], (truth[:, None] * signs)[None], 1e6)
    assert torch.equal(neyman(padded, half), neyman(padded[..., :2000], real[:, :2000]))
    assert torch.equal(neyman(torch.zeros(1, PARTS, 3), real[:, :3]), torch.ones(1, PARTS).double())


def test_a_measured_allocation_pays():
    """Variance sum s^2 / p: near the least, (sum s)^2, where the fixed density is far from it."""
    fixed = densities(torch.tensor([128]))
    part = allocated(fixed, torch.arange(1.0, PARTS + 1).double()[None]) / fixed.clamp(min=1e-300)
    part = (part / part[0, 1]).round()  # 1, 2, 3, 4 by part; 0 outside
    spread = fixed * torch.tensor([0.0, 1.0, 0.4, 2.0, 1.0]).double()[part.long()]
    missed = torch.tensor([1.0, 0.4, 2.0, 1.0]).double()[None, :, None].expand(1, PARTS, 400)
    measured = allocated(fixed, neyman(missed, torch.ones(1, 400, dtype=torch.bool)))

    def excess(p: torch.Tensor) -> float:
        on = p > 0.0
        return float((spread[on].square() / p[on]).sum() / spread.sum().square())

    assert excess(fixed) > 1.25
    assert excess(measured) < 1.02


@pytest.mark.parametrize("seed", range(3))
def test_expectation_under_any_allocation_by_enumeration(seed):
    """Over all counts and orders, and with any forecast, the mean is the bound: no sampling."""
    generator = torch.Generator().manual_seed(seed)
    table, chosen, texts = random_table(seed), family(), all_sequences()[::4]
    held = job(TableDenoiser(table), chosen, texts)
    seen = next(held.batches_of(-1))
    seen = replace(seen, learned=torch.randn(len(texts), 3, LENGTH, generator=generator).double())
    factors = 0.5 + 1.5 * torch.rand(len(texts), PARTS, generator=generator).double()
    sizes = torch.unique(seen.sizes)
    density = allocated(densities(sizes)[[0] * len(texts)][:, None], factors[:, None])
    knots = hats(sizes)[[0] * len(texts)][:, None]
    total = balanced._forecast(seen, knots.sum(-2) / LENGTH).sum(1)
    orders = list(itertools.permutations(range(LENGTH)))
    for count, order in itertools.product(range(1, LENGTH + 1), orders):
        p = density[..., count]
        v = density[..., :count].sum(-1) + p / 2
        u = (torch.tensor(order).double() + 0.5).expand(len(texts), -1) / LENGTH
        missed = balanced._missed(seen, held.scorer, density, knots, v, u)
        total += p[:, 0] * missed.sum(1) / len(orders)
    bounds = [table.nelbo(texts[i]) for i in seen.window.tolist()]
    exact = torch.tensor(bounds, dtype=torch.float64)
    assert (total - exact).abs().max() < 1e-9


def texts_of_tiny_models() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    picks = [torch.randint(len(CLEAN), (n,), generator=generator) for n in (6, 6, 3, 5, 6, 1, 4)]
    return [torch.tensor(CLEAN)[p] for p in picks]


@pytest.mark.parametrize("block_size", [None, 2])
def test_the_allocation_is_the_same_in_any_batch(block_size):
    model, chosen = tiny_model(), tiny_family(block_size)

    def factors(batch_tokens: int) -> dict[int, list[float]]:
        held = job(model, chosen, texts_of_tiny_models(), batch_tokens)
        held(0)
        rows = {}
        for which, found in zip(held.batches, held._allocations, strict=True):
            rows |= dict(zip(which, found.tolist(), strict=True))
        return rows

    together = factors(8192)
    for other in (factors(1), factors(13)):
        assert other.keys() == together.keys()
        for window, found in other.items():
            assert found == pytest.approx(together[window], rel=1e-12)
    assert any(factor != 1.0 for row in together.values() for factor in row)


def test_forecast_allocation_and_rows_have_orders_of_their_own(monkeypatch):
    held = job(tiny_model(), tiny_family(), texts_of_tiny_models())
    steps: dict[str, set[int]] = {"learn": set(), "allocate": set(), "score": set()}
    original, stage = randomness.uniforms, []

    def watched(seed, stream, **keys):
        if stream == randomness.Stream.POSITION:
            steps[stage[-1]].add(keys["step"])
        return original(seed, stream, **keys)

    monkeypatch.setattr(randomness, "uniforms", watched)
    for name in steps:
        method = getattr(Balanced, name)

        def entered(*given, name=name, method=method):
            stage.append(name)
            return method(*given)

        monkeypatch.setattr(Balanced, name, entered)
    for replicate in range(4):
        held(replicate)
    assert all(steps.values())
    assert not steps["learn"] & steps["allocate"]
    assert not (steps["learn"] | steps["allocate"]) & steps["score"]


@pytest.mark.parametrize("part", [0, PARTS - 1])
def test_rows_are_drawn_as_allocated(part, monkeypatch):
    """Masked tokens per row: their mean is that of the allocated density, not of the fixed one."""
    factors = torch.full((1, PARTS), 0.5, dtype=torch.float64)
    factors[0, part] = 2.0
    monkeypatch.setattr(
        Balanced, "allocate", lambda self, batch, scorer: factors.expand(len(batch.x0), -1)
    )
    held = job(TableDenoiser(random_table(0)), family(), all_sequences())
    held(0)  # the pilot, once
    counts, original = [], held.scorer.nats

    def counting(x0, noise, *rest):
        counts.append(noise.corrupted.sum(1).double())
        return original(x0, noise, *rest)

    monkeypatch.setattr(held.scorer, "nats", counting)
    for replicate in range(1, 30):
        held(replicate)
    drawn_counts = torch.cat(counts)
    k, fixed = torch.arange(LENGTH + 1).double(), densities(torch.tensor([LENGTH]))
    mean = float((k * allocated(fixed, factors)).sum())
    stderr = float(drawn_counts.std()) / len(drawn_counts) ** 0.5
    assert abs(float(drawn_counts.mean()) - mean) < 4 * stderr
    assert abs(float((k * fixed).sum()) - mean) > 4 * stderr
