"""Complementary masks: each of the two is a mask of the bound, and so is their mean."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from exact_stats import beta_cdf, gauss_legendre, ks_statistic
from exact_tables import LENGTH, TableDenoiser, all_sequences, family, random_table
from refusals import refused
from tiny_models import CLEAN, MASK, tiny_family, tiny_model
from torch import Tensor

from textdiff.config import Config
from textdiff.config.reading import validate
from textdiff.diffusion.noise import Noise, NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import CountPairs, training_maker
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.train.batches import TrainingBatches

TABLE = random_table(5)
TEXT = all_sequences()[17]
ORDERS = torch.tensor(list(itertools.permutations(range(LENGTH)))).double() / LENGTH + 0.1


def nats(chosen, x0: Tensor, noise: Noise) -> Tensor:
    """[rows] weighted nats."""
    batch = corrupt(chosen, x0, noise, None)
    terms = PositionTerms(TableDenoiser(TABLE), chosen, batch).all()
    return (
        torch.zeros(x0.numel(), dtype=torch.float64)
        .index_add(0, batch.positions, terms)
        .view(x0.shape)
        .sum(1)
    )


def pairs(chosen, draw: str, levels: Tensor, positions: Tensor, **options) -> Noise:
    x0 = TEXT.expand(len(positions), -1)
    maker = training_maker(chosen, draw, in_pairs=True)
    return draw_noise(chosen, x0, NoiseUniforms(levels, positions), maker, **options)


def test_by_count_each_half_is_the_bound():
    """Every count from none to all, in every order."""
    counts = (torch.arange(LENGTH + 1).double() + 0.5) / (LENGTH + 1)
    levels, orders = counts.repeat_interleave(len(ORDERS))[:, None], ORDERS.repeat(LENGTH + 1, 1)
    noise = pairs(family(), "count", levels, orders)
    first, second = nats(family(), TEXT.expand(2 * len(orders), -1), noise).chunk(2)
    assert first.mean().item() == pytest.approx(TABLE.nelbo(TEXT), abs=1e-12)
    assert second.mean().item() == pytest.approx(TABLE.nelbo(TEXT), abs=1e-12)
    k, rest = noise.corrupted.sum(1).chunk(2)
    assert (k + rest == LENGTH).all()
    assert torch.equal(k.bincount(), torch.full((LENGTH + 1,), len(ORDERS)))


@pytest.mark.parametrize("kind", ["loglinear", "cosine", "polynomial"])
def test_by_time_the_complement_is_the_bound(kind):
    """Over all times and all masks, whatever the schedule."""
    chosen = family(schedule={"kind": kind})
    t, weights = gauss_legendre(80)
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
    rate = (1.0 - chosen.schedule.alpha(t))[:, None]  # [T, 1]
    hit = masks.repeat(len(t), 1)  # masked by the first, whatever the time
    u = (~hit).double() * (1.0 - 1e-15)
    noise = pairs(chosen, "time", t.repeat_interleave(len(masks))[:, None], u)
    halves = nats(chosen, TEXT.expand(2 * len(hit), -1), noise).chunk(2)
    k = masks.sum(1)
    chance = (rate**k * (1.0 - rate) ** (LENGTH - k) * weights[:, None]).flatten()
    for half in halves:
        assert float((chance * half).sum()) == pytest.approx(TABLE.nelbo(TEXT), rel=1e-6)


def keyed(rows: int, length: int, blocks: int) -> NoiseUniforms:
    key = torch.arange(rows)[:, None]
    return NoiseUniforms(
        uniforms(0, Stream.JITTER, row=key, block=torch.arange(blocks)),
        uniforms(0, Stream.POSITION, row=key, position=torch.arange(length)),
    )


@pytest.mark.parametrize("draw", ["count", "time"])
@pytest.mark.parametrize("size", [None, 4])
def test_masks_complement_each_other_where_tokens_may_be_masked(draw, size):
    chosen, length = tiny_family(size), 12
    drawn = keyed(50, length, chosen.blocks(length).count)
    given = torch.arange(length) < torch.arange(50)[:, None] % 7
    maker = training_maker(chosen, draw, in_pairs=True)
    x0 = torch.full((50, length), CLEAN[0])
    first, second = draw_noise(chosen, x0, drawn, maker, ~given).corrupted.chunk(2)
    assert torch.equal(second, ~given & ~first)
    assert first.any()
    assert second.any()


def test_a_network_reads_the_rate_that_goes_with_the_count():
    """Beta(k, n - k + 1), for both."""
    n, rows = 5, 60_000
    drawn = keyed(rows, n, 1)
    noise = CountPairs()(tiny_family(), drawn)
    for corrupted, alpha in zip(noise.corrupted.chunk(2), noise.alpha.chunk(2), strict=True):
        count = corrupted.sum(1)
        for k in range(1, n + 1):
            rate = 1.0 - alpha[count == k, 0]
            assert len(rate) > 5000
            assert ks_statistic(beta_cdf(rate, k, n)) < 1.95


def batches(**noise) -> TrainingBatches:
    config = Config.model_validate(
        {
            "data": {"sequence_length": 8},
            "diffusion": {"block_size": 4, "noise": {"complementary": True, **noise}},
            "train": {"global_batch_size": 4, "micro_batch_size": 2},
        }
    )
    tokens = torch.tensor(CLEAN)[torch.arange(8)[:, None] * torch.arange(1, 9) % len(CLEAN)]

    def rows(samples):
        return SimpleNamespace(tokens=tokens[samples].numpy(), documents=None)

    return TrainingBatches(SimpleNamespace(rows=rows), tiny_family(4), config)


@pytest.mark.parametrize("prompts", [0.0, 1.0])
def test_a_step_reads_every_row_twice_however_it_is_split(prompts):
    made = batches(prompts=prompts, prompt_dropout=prompts / 2)
    whole = made.batch(1, torch.arange(4))
    assert whole.x0.shape == (8, 8)
    assert made.scored_tokens(whole) == pytest.approx(64 * (1.0 if not prompts else 0.8125))
    loss = DenoisingLoss(tiny_model(), tiny_family(4))
    total = 0.0
    for micro_step in range(2):
        half = made[2 + micro_step]  # step 1
        rows = torch.cat([made.slots(1, micro_step), 4 + made.slots(1, micro_step)])
        assert torch.equal(half.x0, whole.x0[rows])
        assert torch.equal(half.xt, whole.xt[rows])
        total += loss(half)[0].item()
    assert total == pytest.approx(loss(whole)[0].item(), abs=1e-9)
    masked = whole.xt == MASK
    assert prompts or torch.equal(masked[:4], ~masked[4:])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"process": "uniform", "objective": {"kind": "udlm"}}, "process"),
        ({"timesteps": 10, "noise": {"draw": "time"}}, "timesteps"),
        ({"schedule": {"kind": "learned"}, "noise": {"draw": "time"}}, "schedule"),
        ({"block_size": 1}, "block_size"),
        ({"objective": {"kind": "ar"}, "block_size": 1}, "block_size"),
        ({"noise": {"range": [0.3, 1.0]}}, "noise.range"),
        ({"noise": {"range": "search"}}, "noise.range"),
    ],
    ids=str,
)
def test_masks_without_a_complement_are_refused(change, word):
    noise = {"complementary": True, **change.get("noise", {})}
    model = {"adaln": True, "time_conditioning": True} if "process" in change else {}
    with refused(ConfigError, None, word, "noise.complementary: false"):
        validate({"diffusion": {**change, "noise": noise}, "model": model})
    assert validate({"diffusion": {"noise": {"complementary": True, "range": [0.2, 0.8]}}})
