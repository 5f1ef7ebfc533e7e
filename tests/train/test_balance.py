"""Rows dealt to processes: every row once, and equally many masks in expectation."""

import pytest
import torch

from textdiff.train.balance import deal_rows


@pytest.mark.parametrize(("rows", "hands"), [(24, 4), (12, 4), (8, 8), (6, 1)])
def test_groups_have_one_row_of_every_stratum(rows, hands):
    levels = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = deal_rows(levels, hands)
    assert torch.equal(groups.flatten().sort().values, torch.arange(rows))
    assert torch.equal(groups, groups.sort(-1).values)
    rank = levels.argsort().argsort()[groups]  # [hands, rows / hands]
    assert torch.equal((rank // hands).sort(-1).values, torch.arange(rows // hands).expand_as(rank))
    sums = rank.sum(-1)
    assert sums.max() - sums.min() == (0 if rows // hands % 2 == 0 else hands - 1)
