"""Shapes, blocks, ranges and edges of the noise bundle; its laws are in tests/exact."""

import math

import pytest
import torch
from exact_stats import chi_square_p
from noise_calls import noise_by_count, noise_by_time

from textdiff.diffusion import SCHEDULES
from textdiff.diffusion.family import Blocks
from textdiff.diffusion.noise import NoiseUniforms
from textdiff.diffusion.randomness import Stream, uniforms


def draws(rows: int, blocks: Blocks):
    key = torch.arange(rows)[:, None]
    v = uniforms(0, Stream.JITTER, row=key, block=torch.arange(blocks.count))
    return v, uniforms(0, Stream.POSITION, row=key, position=torch.arange(blocks.length))


@pytest.mark.parametrize(("length", "size"), [(1, None), (7, None), (7, 3), (8, 4), (5, 1), (3, 9)])
def test_split_join_spread_and_span_agree(length, size):
    blocks = Blocks.of(length, size)
    x = torch.arange(2 * length).view(2, length)
    assert torch.equal(blocks.join(blocks.split(x, -1)), x)
    assert (blocks.split(x, -1) == -1).sum() == 2 * (blocks.count * blocks.size - length)
    numbers = torch.arange(blocks.count)[None]
    assert torch.equal(blocks.spread(numbers)[0], blocks.index())
    covered = [p for b in range(blocks.count) for p in range(length)[blocks.span(b)]]
    assert covered == list(range(length))


@pytest.mark.parametrize(("length", "size"), [(1, None), (7, None), (7, 3), (8, 4), (5, 1)])
def test_counts_weights_and_rates_of_every_block(length, size):
    blocks = Blocks.of(length, size)
    v, u = draws(200, blocks)
    noise = noise_by_count(NoiseUniforms(v, u), blocks)
    for b in range(blocks.count):
        span = blocks.span(b)
        n = span.stop - span.start
        k = noise.corrupted[:, span].sum(1)
        assert torch.equal(k, 1 + (v[:, b] * n).long())
        assert (noise.weight[:, span] * k[:, None] - n).abs().max() < 1e-12
        kth = u[:, span].sort(1).values.gather(1, k[:, None] - 1)
        assert torch.equal(noise.alpha[:, span], (1.0 - kth).expand(-1, n))
        assert (
            u[:, span][noise.corrupted[:, span]] <= kth.expand(-1, n)[noise.corrupted[:, span]]
        ).all()


def test_positions_that_are_not_scorable_are_never_hit_and_never_counted():
    blocks = Blocks.of(9, 4)  # blocks of 4, 4, 1
    v, u = draws(500, blocks)
    scorable = torch.tensor([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=torch.bool).expand(500, -1)
    noise = noise_by_count(NoiseUniforms(v, u), blocks, scorable=scorable)
    assert not (noise.corrupted & ~scorable).any()
    k = noise.corrupted[:, :4].sum(1)
    assert torch.equal(k, 1 + (v[:, 0] * 3).long())
    assert (noise.weight[:, 0] * k - 3.0).abs().max() < 1e-12
    assert not noise.corrupted[:, 4:8].any()
    assert (noise.alpha[:, 4:8] == 1.0).all()
    assert noise.corrupted[:, 8].all()
    assert (noise.weight[:, 8] == 1.0).all()
    timed = noise_by_time(
        SCHEDULES.build("loglinear"), NoiseUniforms(v, u), blocks, scorable=scorable
    )
    assert not (timed.corrupted & ~scorable).any()
    assert timed.corrupted.any()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.3, 0.8), (0.5, 1.0), (0.95, 1.0)])
def test_counts_stay_in_their_range_and_are_uniform_there(low, high):
    n, rows = 10, 20_000
    blocks = Blocks.of(n, None)
    v, u = draws(rows, blocks)
    k = noise_by_count(NoiseUniforms(v, u), blocks, rates=(low, high)).corrupted.sum(1)
    allowed = list(range(max(1, math.ceil(low * n - 1e-9)), math.floor(high * n + 1e-9) + 1))
    counts = torch.bincount(k, minlength=n + 1).double()
    assert counts.nonzero().flatten().tolist() == allowed
    if len(allowed) > 1:
        expected = torch.full((len(allowed),), rows / len(allowed), dtype=torch.float64)
        assert chi_square_p(counts[allowed], expected) > 1e-3


def test_a_range_without_a_whole_number_hits_the_next_count():
    blocks = Blocks.of(4, None)
    v, u = draws(50, blocks)
    assert (
        noise_by_count(NoiseUniforms(v, u), blocks, rates=(0.3, 0.4)).corrupted.sum(1) == 2
    ).all()


@pytest.mark.parametrize("n", [2, 3, 7, 13, 49, 100, 128])
def test_range_ends_that_are_whole_numbers_belong_to_the_range(n):
    """k / n times n is k, also where binary fractions are off by a rounding."""
    blocks = Blocks.of(n, None)
    ends = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    u = uniforms(0, Stream.POSITION, row=torch.arange(2)[:, None], position=torch.arange(n))
    for k in range(1, n):
        hit = noise_by_count(NoiseUniforms(ends, u), blocks, rates=(k / n, 1.0)).corrupted.sum(1)
        assert hit.tolist() == [k, n]
        hit = noise_by_count(NoiseUniforms(ends, u), blocks, rates=(0.0, k / n)).corrupted.sum(1)
        assert hit.tolist() == [1, k]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_times_of_every_schedule_stay_inside_and_finite(kind):
    schedule = SCHEDULES.build(kind)
    blocks = Blocks.of(6, 2)
    v, u = draws(300, blocks)
    noise = noise_by_time(schedule, NoiseUniforms(v, u), blocks)
    assert torch.equal(noise.alpha, blocks.spread(schedule.alpha(v)))
    assert noise.weight.isfinite().all()
    assert ((noise.threshold > 0) & (noise.threshold < 1)).all()


def test_a_schedule_that_never_masks_everything_does_not_start_to():
    """loglinear with eps = 0.1 keeps a tenth of the tokens at t = 1; later times do not exist."""
    blocks = Blocks.of(1, None)
    v = torch.tensor([[1.0 - 2.0**-53]], dtype=torch.float64)
    noise = noise_by_time(SCHEDULES.build("loglinear", {"eps": 0.1}), NoiseUniforms(v, v), blocks)
    assert float(noise.alpha) == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_mask_rates_by_time_stay_in_their_range(kind):
    blocks = Blocks.of(4, None)
    v, u = draws(300, blocks)
    rate = noise_by_time(
        SCHEDULES.build(kind), NoiseUniforms(v, u), blocks, rates=(0.3, 0.8)
    ).threshold
    assert float(rate.min()) == pytest.approx(0.3, abs=0.02)
    assert float(rate.max()) == pytest.approx(0.8, abs=0.02)
    assert ((rate >= 0.3 - 1e-12) & (rate <= 0.8 + 1e-12)).all()


def test_noise_at_positions_is_the_noise_there():
    blocks = Blocks.of(6, 2)
    v, u = draws(3, blocks)
    noise = noise_by_count(NoiseUniforms(v, u), blocks)
    positions = torch.tensor([0, 7, 17])
    at = noise.at(positions)
    for name in ("alpha", "threshold", "u", "weight"):
        assert torch.equal(getattr(at, name), getattr(noise, name).flatten()[positions])
