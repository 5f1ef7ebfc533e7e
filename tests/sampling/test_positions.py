"""Positions of a canvas, by brute force."""

import torch

from textdiff.sampling.positions import Positions

ROWS, WIDTH = 5, 7
GENERATOR = torch.Generator().manual_seed(0)
CHOSEN = torch.rand(ROWS, WIDTH, generator=GENERATOR) < 0.6
CHOSEN[2] = False  # a row without any
PAIRS = [(row, column) for row in range(ROWS) for column in range(WIDTH) if CHOSEN[row, column]]


def pairs(positions: Positions) -> list[tuple[int, int]]:
    assert torch.equal(positions.known // WIDTH, positions.row)
    return list(zip(positions.row.tolist(), positions.column.tolist(), strict=True))


def test_positions_are_those_of_a_mask_row_by_row():
    positions = Positions.where(CHOSEN)
    assert pairs(positions) == PAIRS
    assert positions.number.tolist() == CHOSEN.sum(1).tolist()
    assert positions.after(torch.arange(len(PAIRS)) * 100).tolist() == [
        index * 100 + column for index, (_, column) in enumerate(PAIRS)
    ]
    assert pairs(positions[2:5]) == PAIRS[2:5]
    assert pairs(positions[torch.tensor([4, 0])]) == [PAIRS[4], PAIRS[0]]
    assert pairs(positions[positions.row == 3]) == [pair for pair in PAIRS if pair[0] == 3]


def test_tables_are_read_and_spread():
    positions = Positions.where(CHOSEN)
    table = torch.rand(ROWS, WIDTH, generator=GENERATOR)
    assert torch.equal(positions.read(table), table[CHOSEN])
    spread = positions.spread(positions.read(table))
    assert torch.equal(spread, table.masked_fill(~CHOSEN, -torch.inf))


def test_the_first_of_an_order_are_taken_and_the_others_left():
    positions = Positions.where(CHOSEN)
    keys = torch.rand(len(positions), generator=GENERATOR)
    number = (positions.number / 2).ceil().long()
    order = positions.spread(keys).argsort(dim=1, descending=True, stable=True)
    now, later = positions.first(order, number)
    best = []
    for row in range(ROWS):
        own = [index for index, pair in enumerate(PAIRS) if pair[0] == row]
        best += sorted(own, key=lambda index: -keys[index])[: int(number[row])]
    assert now.tolist() == sorted(best)
    assert later.tolist() == [index for index in range(len(PAIRS)) if index not in best]
    assert pairs(positions.take(now, number)) == [PAIRS[index] for index in sorted(best)]
    left = positions.take(later, positions.number - number)
    assert torch.equal(left.number, positions.number - number)
    assert not set(pairs(left)) & {PAIRS[index] for index in best}
