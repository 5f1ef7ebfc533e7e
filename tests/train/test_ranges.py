"""Mask rates in ranges: what is drawn, what the search measures, and what training makes of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from textdiff.config import Config
from textdiff.diffusion.family import Blocks, Family, build_family
from textdiff.diffusion.noise import NoiseUniforms, draw_noise
from textdiff.diffusion.pairs import training_maker
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.train.batches import TrainingBatches
from textdiff.train.ranges import CANDIDATES, block_losses, inside, search_range

IDS, MASK, LENGTH = 6, 5, 12
SEES = {"adaln": True, "time_conditioning": True}
OBJECTIVES = {
    "mdlm": {"objective": {"kind": "mdlm"}},
    "mdlm-ce": {"objective": {"kind": "mdlm", "loss_weight": "ce"}},
    "sedd": {"objective": {"kind": "sedd"}},
    "sedd-uniform": {"process": "uniform", "objective": {"kind": "sedd"}},
    "udlm": {"process": "uniform", "objective": {"kind": "udlm"}},
    "gidd": {
        "process": "hybrid",
        "schedule": {"kind": "hybrid", "uniform": 0.1},
        "objective": {"kind": "gidd"},
    },
}


class Rows:
    """Packed sequences of random tokens."""

    def rows(self, samples):
        drawn = [np.random.default_rng(s).integers(0, MASK, LENGTH) for s in samples]
        return SimpleNamespace(tokens=np.array(drawn), documents=None)


def family(block_size: int | None = None, name: str = "mdlm") -> Family:
    spec = {"process": "absorbing", "schedule": {"kind": "loglinear"}, "timesteps": None}
    spec |= OBJECTIVES[name] | {"block_size": block_size}
    return build_family(spec, Vocabulary.of(IDS, MASK, ()))


def batches(name="mdlm", draw="count", rates=(0.0, 1.0), rows=4, **more) -> TrainingBatches:
    diffusion = OBJECTIVES[name] | {"noise": {"draw": draw, "range": rates}}
    diffusion |= {"block_size": more.pop("block_size", 4)}
    raw = {
        "data": {"sequence_length": LENGTH, "num_workers": more.pop("workers", 0)},
        "model": SEES,
        "diffusion": diffusion,
        "train": {"global_batch_size": rows, "micro_batch_size": more.pop("micro", rows)},
        "sample": {"max_new_tokens": 4},
    }
    config = Config.model_validate(raw)
    return TrainingBatches(Rows(), family(config.diffusion.block_sizes[0], name), config, **more)


def network(seed: int = 0) -> TextDiffusionModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        config = TextDiffusionConfig(
            vocab_size=IDS,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            mask_token_id=MASK,
        )
        model = TextDiffusionModel(config).double().eval()
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rates_of(noise, blocks: Blocks, draw: str) -> torch.Tensor:
    """[B, blocks] the level of each block by time, the share of its positions by count."""
    if draw == "time":
        return blocks.split(1.0 - noise.alpha, 0.0)[..., 0]
    return blocks.split(noise.corrupted, False).double().mean(-1)


def noise_of(batches: TrainingBatches, samples, levels, rates=(0.0, 1.0)):
    family = batches.family
    return batches.maker(family, rates)(family, batches.uniforms(family, samples, levels))


@pytest.mark.parametrize("draw", ["count", "time"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_noise_of_every_objective_stays_in_its_range(name, draw):
    low, high, blocks = 0.25, 0.5, Blocks.of(LENGTH, 4)
    for rates in ((low, high), (0.0, 1.0)):
        chosen = batches(name, draw, rates, rows=16)
        found = torch.cat(
            [
                rates_of(
                    noise_of(
                        chosen,
                        16 * step + torch.arange(16),
                        chosen.levels(step, 16, blocks),
                        chosen.ranges[4],
                    ),
                    blocks,
                    draw,
                )
                for step in range(8)
            ]
        )
        assert found.min() >= rates[0]
        assert found.max() <= rates[1]
        # All of the range is visited, and nothing outside it is missed by accident.
        assert found.min() < rates[0] + 0.26
        assert found.max() > rates[1] - 0.01


def test_a_step_draws_from_the_range_in_force():
    chosen = batches(draw="count", rates=(0.25, 0.25 + 1e-6), rows=8)
    assert ((chosen[3].xt == MASK).view(8, 3, 4).sum(-1) == 1).all()
    chosen.ranges = {4: (0.75, 0.8)}
    assert ((chosen[3].xt == MASK).view(8, 3, 4).sum(-1) == 3).all()


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("rates", [(0.0, 1.0), (0.3, 0.8)])
@pytest.mark.parametrize("draw", ["count", "time"])
def test_no_block_has_rates_of_its_own(draw, rates, rows):
    """Trap of the published strata: tied to the block, E[rate | block] drifts from 0 to 1."""
    chosen = batches(draw=draw, rates=rates, rows=rows)
    blocks, steps = Blocks.of(LENGTH, 4), 300
    total = torch.zeros(rows, blocks.count, dtype=torch.float64)
    for step in range(steps):
        v = chosen.levels(step, rows, blocks)
        noise = noise_of(chosen, torch.arange(rows) + step * rows, v, rates)
        total += rates_of(noise, blocks, draw)
    counts = [k / 4 for k in range(1, 5) if rates[0] <= k / 4 <= rates[1]]
    expected = sum(counts) / len(counts) if draw == "count" else sum(rates) / 2
    deviation = 0.3 / steps**0.5  # U[0, 1] has 0.289, four counts have 0.28
    assert (total / steps - expected).abs().max() < 4.5 * deviation


# --- what is measured ------------------------------------------------------------------------


def test_candidates_are_the_full_range_and_those_half_as_wide_or_wider():
    widths = {round(high - low, 10) for low, high in CANDIDATES}
    assert widths == {1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5}
    assert CANDIDATES[0] == (0.0, 1.0)
    assert len(set(CANDIDATES)) == len(CANDIDATES) == 1 + sum(range(3, 12))
    assert all(0.0 <= low < high <= 1.0 for low, high in CANDIDATES)


@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("name", ["mdlm", "udlm"])
@pytest.mark.parametrize("draw", ["count", "time"])
def test_draws_inside_a_range_have_the_law_of_draws_of_it(draw, name, size):
    """Selecting from the full range is drawing from the range: levels, and hits given levels."""
    length = 2 * size  # the second block's draws are for themselves
    chosen, blocks = family(size, name), Blocks.of(length, size)
    grid = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    v = grid[:, None].expand(-1, blocks.count)
    rows = torch.arange(len(v))[:, None]
    u = uniforms(0, Stream.POSITION, row=rows, position=torch.arange(length))

    def drawn(rates):
        return draw_noise(
            chosen,
            torch.zeros(u.shape, dtype=torch.int64),
            NoiseUniforms(v, u),
            training_maker(chosen, draw, rates),
        )

    whole = drawn((0.0, 1.0))
    for rates in (CANDIDATES[0], (0.3, 0.8), (0.5, 1.0), (0.0, 0.5), (0.05, 0.95)):
        kept = inside(whole, blocks, rates, draw, chosen.objective.scores_all_positions)
        some = rates_of(whole, blocks, draw)[:, 0][kept[:, 0]].sort().values
        other = rates_of(drawn(rates), blocks, draw)[:, 0].sort().values
        at = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
        quantile = [x[(at * len(x)).long()] for x in (some, other)]
        # By count only a grid point next to a jump may fall on its other side.
        wrong = (quantile[0] - quantile[1]).abs() > 2e-4
        assert wrong.sum() <= (1 if draw == "count" else 0), rates


@pytest.mark.parametrize("draw", ["count", "time"])
def test_the_loss_of_blocks_is_the_training_loss(draw):
    chosen, model = batches(draw=draw, rows=4), network()
    losses, _ = block_losses(model, chosen.family, chosen, 5)
    assert losses.shape == (1365, 3)  # at least 4096 blocks of three to a row, cut to whole rows
    samples = 20 + torch.arange(len(losses))
    again = batches(draw=draw, rows=4)
    # The same rows under the run's own seed: another draw of the same law.
    x0, ids = again.rows(samples)
    v = again.levels(5, len(losses), Blocks.of(LENGTH, 4))
    batch = corrupt(chosen.family, x0, noise_of(again, samples, v), ids)
    with torch.no_grad():
        loss, _ = DenoisingLoss(model, chosen.family)(batch)
    spread = float(losses.std()) / losses.numel() ** 0.5
    assert float(losses.mean()) == pytest.approx(float(loss) / x0.numel(), abs=6 * spread)
    assert spread < 0.02 * float(losses.mean())


def test_the_search_takes_the_smallest_variance_among_draws_of_the_ranges():
    chosen, model = batches(rows=4), network()
    found = search_range(model, chosen.family, chosen, 5)
    direct = {}
    for rates in (found.range, (0.0, 1.0), (0.0, 0.5), (0.3, 0.8)):
        fixed = batches(rows=1024, rates=rates)
        batch = fixed.batch(0, torch.arange(1024))
        with torch.no_grad():
            terms = PositionTerms(model, chosen.family, batch).all()
        nats = torch.zeros(batch.x0.numel(), dtype=torch.float64)
        nats = nats.index_add(0, batch.positions, terms).view(1024, 3, 4)
        direct[rates] = float((nats.sum(-1) / 4).var())
    assert found.variance == pytest.approx(direct[found.range], rel=0.15)
    assert found.unclipped == pytest.approx(direct[(0.0, 1.0)], rel=0.15)
    assert direct[found.range] < 0.8 * direct[(0.0, 1.0)]
    assert all(direct[found.range] < 1.1 * value for value in direct.values())


def test_the_widest_of_equal_ranges_is_taken():
    """Of blocks of one token by count every range draws the same."""
    chosen = batches(block_size=1, rows=4)
    found = search_range(network(), chosen.family, chosen, 0)
    assert found.range == (0.0, 1.0)
    assert found.variance == found.unclipped > 0.0


def test_the_search_knows_weights_seed_and_step_alone():
    model, chosen = network(), batches(rows=4)
    first = search_range(model, chosen.family, chosen, 5)
    other = batches(rows=4, micro=2, rank=1, processes=2)
    other.ranges = {4: (0.3, 0.8)}
    again = search_range(model, other.family, other, 5)
    assert again.range == first.range
    assert again.variance == pytest.approx(first.variance, rel=1e-12)
    assert search_range(model, chosen.family, chosen, 6).variance != first.variance
    assert search_range(network(1), chosen.family, chosen, 5).variance != first.variance


def test_processes_share_a_search_bit_for_bit():
    model, chosen = network(), batches(rows=4)
    whole, noise = block_losses(model, chosen.family, chosen, 5)
    parts = [block_losses(model, chosen.family, chosen, 5, (rank, 3)) for rank in range(3)]
    assert torch.equal(parts[1][1].corrupted, noise.corrupted)
    assert ((parts[0][0] != 0) & (parts[1][0] != 0)).sum() == 0
    torch.testing.assert_close(sum(losses for losses, _ in parts), whole, rtol=1e-12, atol=1e-14)


# --- what training makes of it ---------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_prepared_ahead_are_made_again_under_new_ranges(workers):
    chosen = batches(rows=4, micro=2, workers=workers)
    loader, found = chosen.loader(2, 8), []
    for index in range(2 * 2, 8 * 2):
        found.append(next(loader).xt)
        if index == 7:
            chosen.ranges = {4: (0.75, 1.0)}
    assert next(loader, None) is None
    late = batches(rows=4, micro=2)
    late.ranges = {4: (0.75, 1.0)}
    early = batches(rows=4, micro=2)
    for index, xt in zip(range(4, 16), found, strict=True):
        assert torch.equal(xt, (early if index <= 7 else late)[index].xt)
    assert not torch.equal(found[-1], early[15].xt)


def test_block_sizes_are_drawn_by_step_alone():
    sizes = [4, 12, None]
    one = batches(rows=4, block_size=sizes)
    drawn = [one.block_size(step) for step in range(900)]
    for size in sizes:
        assert drawn.count(size) == pytest.approx(300, abs=60)
    parts = [batches(rows=4, micro=1, block_size=sizes, rank=r, processes=2) for r in (0, 1)]
    for step in range(12):
        made = [part[2 * step + micro] for part in parts for micro in (0, 1)]
        assert {batch.block_size for batch in made} == {drawn[step]}
        assert one[step].sigma.shape == (4, 3 if drawn[step] == 4 else 1)


def test_the_loss_follows_the_block_size_of_the_batch():
    sizes, model = [4, None], network()
    chosen = batches(rows=4, block_size=sizes)
    steps = {chosen.block_size(step): step for step in range(8)}
    loss = DenoisingLoss(model, family(4))
    for size, step in steps.items():
        with torch.no_grad():
            found = loss(chosen[step])[0]
            own = DenoisingLoss(model, family(size))(chosen[step])[0]
        assert found == own
    assert set(steps) == set(sizes)
