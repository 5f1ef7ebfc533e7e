"""First hitting: the law of any one-token-at-a-time chain, at the times of the process."""

import itertools
import math

import pytest
import torch
from exact_stats import ks_statistic
from exact_tables import CLEAN, LENGTH, MASK, ROWS, Table, all_sequences, code, family
from torch import Tensor

from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import build_rule
from textdiff.sampling.rules.ancestral import Ancestral
from textdiff.sampling.rules.first_hitting import FirstHitting, hitting_times
from textdiff.sampling.segment import Segment

LEVELS = 8


def dyadic_table(seed: int = 7) -> Table:
    """Arbitrary conditionals in multiples of 1 / LEVELS, so that a grid of uniforms is exact."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS**LENGTH, LENGTH, LEVELS - 1)
    cuts = (torch.rand(shape, generator=generator).argsort(-1)[..., :2] + 1).sort(-1).values
    shares = torch.stack(
        [cuts[..., 0], cuts[..., 1] - cuts[..., 0], LEVELS - cuts[..., 1]], -1
    ).double()
    log_p = torch.full((*shape[:2], ROWS), -torch.inf, dtype=torch.float64)
    log_p[..., list(CLEAN)] = (shares / LEVELS).log()
    return Table(log_p)


def denoiser(table: Table):
    """A time-free network that reads the table; NaN where a visible token is asked for."""

    def denoise(canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        rows, where = positions.row, positions.column
        assert (canvas.flatten()[positions.flat] == MASK).all()
        return Prediction(table.log_p[code(canvas)[rows], where])

    return denoise


def walk(rule, table: Table, canvas: Tensor, draws, steps: int = 1, frozen=None):
    chosen = family()
    return list(
        rule(
            Segment(
                denoiser(table),
                chosen.process,
                chosen.schedule,
                canvas,
                steps=steps,
                frozen=torch.zeros_like(canvas, dtype=torch.bool) if frozen is None else frozen,
                uniforms=draws,
                controls=Controls(),
            )
        )
    )


def test_every_order_of_reveals_has_exactly_its_chain_law():
    """All orders and all token cells, through the rule itself: mean over orders of the chains."""
    table = dyadic_table()
    points = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    tokens = torch.cartesian_prod(*[points] * LENGTH)
    orders = torch.tensor(list(itertools.permutations([0.2, 0.5, 0.8])), dtype=torch.float64)
    rows = len(orders) * len(tokens)
    draws = {
        Stream.POSITION: orders.repeat_interleave(len(tokens), 0),
        Stream.TOKEN: tokens.repeat(len(orders), 1),
    }
    steps = walk(
        FirstHitting(), table, torch.full((rows, LENGTH), MASK), lambda stream, _: draws[stream]
    )
    assert len(steps) == LENGTH
    lookup = code(all_sequences())
    found = (code(steps[-1].canvas)[:, None] == lookup).double().mean(0)
    law = torch.tensor(
        [
            sum(math.exp(-table.chain(x, o)) for o in itertools.permutations(range(LENGTH))) / 6
            for x in all_sequences()
        ],
        dtype=torch.float64,
    )
    assert (found - law).abs().max() < 1e-12


def test_it_is_the_limit_of_ancestral_sampling_token_for_token():
    table, rows = dyadic_table(), 400

    def draws(stream: Stream, step: int) -> Tensor:
        row = torch.arange(rows)[:, None]
        return uniforms(5, stream, row=row, step=step, position=torch.arange(LENGTH))

    start = torch.full((rows, LENGTH), MASK)
    limit = walk(FirstHitting(), table, start, draws)[-1].canvas
    fine = walk(Ancestral(), table, start, draws, steps=2**16)[-1].canvas
    coarse = walk(Ancestral(), table, start, draws, steps=2)[-1].canvas
    assert torch.equal(limit, fine)
    assert not torch.equal(limit, coarse)


@pytest.mark.parametrize("kind", ["loglinear", "cosine", "polynomial"])
def test_noise_levels_shrink_by_the_power_law_of_the_masks_left(kind):
    """(lambda_{k-1} / lambda_k) ** k is uniform, and independent of which position it is."""
    rows, length = 4000, 5
    schedule = family(schedule={"kind": kind}).schedule
    u = uniforms(2, Stream.POSITION, row=torch.arange(rows)[:, None], position=torch.arange(length))
    order, times = hitting_times(schedule, u, torch.zeros(rows, length, dtype=torch.bool))
    levels = 1.0 - schedule.alpha(times)
    before = torch.cat([torch.ones(rows, 1, dtype=torch.float64), levels[:, :-1]], 1)
    left = torch.arange(length, 0, -1)
    ratios = (levels / before) ** left
    for column in range(length):
        assert ks_statistic(ratios[:, column]) < 1.95
        assert ks_statistic(ratios[order[:, 0] == column, 1]) < 1.95
    assert (times.diff(dim=1) < 0).all()


def test_each_row_makes_one_call_per_open_position_and_leaves():
    generator = torch.Generator().manual_seed(0)
    frozen = torch.rand(50, LENGTH, generator=generator) < 0.5
    canvas = torch.where(frozen, CLEAN[1], MASK)
    table = dyadic_table()

    def draws(stream: Stream, step: int) -> Tensor:
        return torch.rand(50, LENGTH, generator=generator, dtype=torch.float64)

    steps = walk(FirstHitting(), table, canvas, draws, frozen=frozen)
    revealed = torch.zeros_like(frozen)
    for step in steps:
        rows = step.changed // LENGTH
        assert len(rows.unique()) == len(rows)
        assert torch.equal(rows, ((~frozen).sum(1) > step.index).nonzero().squeeze(1))
        revealed.view(-1)[step.changed] = True
        assert torch.equal(step.canvas[frozen], canvas[frozen])
    assert torch.equal(revealed, ~frozen)
    assert len(steps) == int((~frozen).sum(1).max())


def test_schedules_that_end_early_reveal_the_rest_at_time_zero():
    schedule = family(schedule={"kind": "geometric", "sigma_min": 0.2, "sigma_max": 5.0}).schedule
    u = torch.tensor([[0.999, 0.001, 0.5]], dtype=torch.float64)
    _, times = hitting_times(schedule, u, torch.zeros(1, 3, dtype=torch.bool))
    assert times[0, 2] == 0.0
    assert ((times >= 0.0) & (times <= 1.0)).all()


def test_it_is_refused_where_reveals_depend_on_the_token():
    learned = family(schedule={"kind": "learned"})
    with pytest.raises(ConfigError, match=r"first_hitting reveals masks .* ancestral"):
        build_rule("first_hitting", learned)
    assert build_rule("first_hitting", family()) == FirstHitting()
