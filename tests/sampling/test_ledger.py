"""Open positions of a canvas, as the CPU keeps them."""

import torch

from textdiff.sampling.open_places import Ledger
from textdiff.sampling.positions import Positions


def ledger() -> tuple[Ledger, torch.Tensor]:
    is_open = torch.tensor([[True, True, False], [False, True, True]])
    return Ledger(is_open), is_open


def test_a_call_is_settled_by_what_was_open_when_it_began():
    book, is_open = ledger()
    positions = Positions.where(book.begin())
    book.close(positions, torch.tensor([True, False, True, True]))
    assert torch.equal(book.settle(), is_open)
    assert book.begin().nonzero().tolist() == [[0, 1]]
    book.close(Positions.where(book.begin()))
    assert (bool(book.settle().any()), book.none_left) == (True, True)


def test_positions_that_open_again_are_left():
    book, is_open = ledger()
    book.close(Positions.where(is_open))
    again = torch.zeros_like(is_open)
    again[1, 2] = True
    book.replace(again)
    assert not book.none_left
    assert torch.equal(book.begin(), again)


def test_masks_of_a_caller_may_change_afterwards():
    book, is_open = ledger()
    which = torch.tensor([True, False, False, False])
    book.close(Positions.where(is_open), which)
    which.fill_(True)
    again = torch.zeros_like(is_open)
    again[0, 0] = True
    left = is_open & ~again
    book.replace(left)
    left.zero_()
    assert torch.equal(book.now, is_open & ~again)
