"""Rows dealt to processes: every row once, and equally many masks in expectation."""

import numpy as np
import pytest
import torch

from textdiff.config import Config
from textdiff.data.sequences import PackedRows
from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.train.balance import deal_rows
from textdiff.train.batches import TrainingBatches


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


class Numbered:
    """A corpus whose rows repeat their own number."""

    def rows(self, indices):
        tokens = np.repeat(np.array(indices)[:, None], LENGTH, axis=1)
        return PackedRows(tokens, np.zeros(tokens.shape, np.int32))


LENGTH, PROCESSES, ROWS = 64, 4, 16


def test_processes_mask_about_equally_many_positions():
    config = Config.model_validate({
        "data": {"sequence_length": LENGTH},
        "train": {"global_batch_size": 2 * PROCESSES * ROWS, "micro_batch_size": ROWS},
    })  # fmt: skip
    kinds = {"schedule": {"kind": "loglinear"}, "objective": {"kind": "mdlm"}}
    spec = kinds | {"process": "absorbing", "block_size": None}
    family = build_family(spec, Vocabulary.of(500, 499))
    ranks = [TrainingBatches(Numbered(), family, config, rank, PROCESSES) for rank in range(4)]
    for step in range(3):
        rows, excess = [], []
        for number in (2 * step, 2 * step + 1):
            made = [batches[number] for batches in ranks]
            counts = torch.tensor([len(batch.positions) for batch in made]).double()
            excess.append(float(counts.max() / counts.mean()) - 1.0)
            rows += [batch.x0[:, 0] for batch in made]
        first = step * 2 * PROCESSES * ROWS
        assert torch.equal(torch.cat(rows).sort().values, first + torch.arange(len(rows) * ROWS))
        assert max(excess) < 0.02
