"""Answers given their prompts: the loss is the conditional bound, in one pass and in any row."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_tables import EXCLUDED, MASK, ROWS, TableDenoiser, masked, random_table
from talks import END, PAD, sequences, turn
from tiny_models import tiny_family, tiny_model
from torch import Tensor

from textdiff.config import Config
from textdiff.data.answer_layout import RowLayout
from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import ByCount, NoiseUniforms, draw_noise
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import DenoisingLoss, PositionTerms, corrupt
from textdiff.train.batches import TrainingBatches

# --- the loss is the bound on the answer given the prompt -----------------------------------------


def enumerated(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Uniforms of levels [R, blocks] and positions [R, sum of sizes]: every count, every order."""
    blocks = [
        [((k + 0.5) / n, order) for k in range(n) for order in itertools.permutations(range(n))]
        for n in sizes
    ]
    rows = list(itertools.product(*blocks))
    levels = torch.tensor([[level for level, _ in row] for row in rows], dtype=torch.float64)
    orders = [
        [(place + 1) / (n + 2) for n, (_, order) in zip(sizes, row, strict=True) for place in order]
        for row in rows
    ]
    return levels, torch.tensor(orders, dtype=torch.float64)


@pytest.mark.parametrize("prompt_uniform", [0.0, 0.999])
@pytest.mark.parametrize("size", [None, 2])
def test_the_expected_loss_is_the_bound_given_the_prompt(tmp_path, size, prompt_uniform):
    table, x = random_table(3, 4), torch.tensor([0, 2, END, END])
    levels, orders = enumerated([3] if size is None else [1, 2])
    count = len(levels)
    raw = {
        "data": {"sequence_length": 4, "conversations": {}},
        "diffusion": {"block_size": size},
        "train": {"global_batch_size": count, "micro_batch_size": count},
    }
    settings = Config.model_validate(raw)
    spec = settings.diffusion.model_dump(mode="json")
    family = build_family(spec, Vocabulary.of(ROWS, MASK, [EXCLUDED]))
    rows = sequences(tmp_path, [[turn([0], [2])]], 4, block_sizes=(size,))
    batches = TrainingBatches(rows, family, settings)
    position = torch.cat([torch.full((count, 1), prompt_uniform), orders], dim=1)
    batches.levels = lambda *_: levels
    batches._uniforms = lambda *_: position
    batch = batches[0]
    assert torch.equal(batch.x0, x.expand(count, 4))
    assert torch.equal(batch.xt[:, 0], batch.x0[:, 0])
    assert batches.scored_tokens(batch) == count  # the end and the fill are not counted
    nats = PositionTerms(TableDenoiser(table), family, batch).all().sum() / count

    def bound(scored: tuple[int, ...], unseen: tuple[int, ...] = ()) -> float:
        n = len(scored)
        total = 0.0
        for k in range(1, n + 1):
            for s in itertools.combinations(scored, k):
                z = masked(x, (*s, *unseen))
                terms = table.log_p[(z * ROWS ** torch.arange(3, -1, -1)).sum()]
                total -= sum(float(terms[i, x[i]]) for i in s) / (k * math.comb(n, k))
        return total

    exact = bound((1, 2, 3)) if size is None else bound((1,), (2, 3)) + bound((2, 3))
    assert float(nats) == pytest.approx(exact, abs=1e-12)


# --- one pass, turn by turn, packed and padded ----------------------------------------------------

FIRST = [turn([0, 1], [2, 5]), turn([6, 7, 8], [0, 2])]
SECOND = [turn([5], [6, 7, 1, 2])]
SPAN = {4: (16, 8), 1: (11, 6)}  # tokens of both with their fill


def nats_of(family, tokens, scored, ids, u) -> Tensor:
    """[B, L] nats where the uniforms of levels and of positions are given."""
    model = tiny_model()
    x0, marks = torch.as_tensor(tokens), torch.as_tensor(scored)
    blocks = family.blocks(x0.shape[1])
    level = u[:, :: blocks.size]
    noise = draw_noise(family, x0, NoiseUniforms(level, u), ByCount(), marks)
    batch = corrupt(family, x0, noise, None if ids is None else torch.as_tensor(ids))
    assert torch.equal(batch.xt[~marks], x0[~marks])
    terms = PositionTerms(model, family, batch).all().detach()
    assert marks.flatten()[batch.positions].all()
    return torch.zeros(x0.numel()).double().index_add(0, batch.positions, terms).view(x0.shape)


@pytest.mark.parametrize(("kind", "size"), [("mdlm", 4), ("ar", 1)])
def test_packed_rows_cost_what_padded_ones_and_turns_by_themselves_do(tmp_path, kind, size):
    family = tiny_family(size) if kind == "mdlm" else tiny_ar()
    lengths = SPAN[size]
    length = sum(lengths)
    u = torch.rand(1, length, generator=torch.Generator().manual_seed(1)).double()
    own = torch.cat([u, torch.rand(1, length).double()], dim=1)
    pieces = own[:, : lengths[0]], own[:, lengths[0] : length]
    packed = sequences(
        tmp_path / "packed", [FIRST, SECOND], length, packing="packed", block_sizes=(size,)
    )
    row = packed.rows([0])
    assert row.documents.tolist() == [[0] * lengths[0] + [1] * lengths[1]]
    found = nats_of(family, row.tokens, row.scored, row.documents, u)
    padded = sequences(tmp_path / "padded", [FIRST, SECOND], length, block_sizes=(size,))
    rows = padded.rows([0, 1])
    first = int(rows.tokens[0, 0] != 0)  # the row of the first conversation
    filled = [torch.cat([p, torch.full((1, length - p.shape[1]), 0.5)], 1) for p in pieces]
    alone = nats_of(
        family, rows.tokens, rows.scored, None, torch.cat([filled[first], filled[1 - first]])
    ).sum(1)
    assert float(found[0, : lengths[0]].sum()) == pytest.approx(float(alone[first]), abs=1e-10)
    assert float(found[0, lengths[0] :].sum()) == pytest.approx(float(alone[1 - first]), abs=1e-10)

    layout, pairs = RowLayout(length, size, END), [(t.prompt, t.answer) for t in FIRST]
    total = 0.0
    for turns in (pairs[:1], pairs):
        one = layout.write(turns, last_only=True)
        given = pieces[0][:, : len(one.tokens)]
        tokens = one.tokens[None].astype(np.int64)
        total += float(nats_of(family, tokens, one.scored[None], None, given).sum())
    assert total == pytest.approx(float(alone[first]), abs=1e-10)


def tiny_ar():
    spec = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "ar"},
        "block_size": 1,
    }
    return build_family(spec, tiny_family(1).process.vocabulary)


def test_the_next_token_loss_beside_blocks_is_of_answers_too(tmp_path):
    family = tiny_family(4, ar_weight=1.0)
    rows = sequences(tmp_path, [FIRST], 24, block_sizes=(4,)).rows([0])
    x0, marks = torch.as_tensor(rows.tokens), torch.as_tensor(rows.scored)
    u = torch.full((1, 24), 0.5).double()
    noise = draw_noise(family, x0, NoiseUniforms(u[:, :6], u), ByCount(), marks)
    batch = corrupt(family, x0, noise, None)
    model = tiny_model().train()
    losses = [
        float(DenoisingLoss(model, family)(each)[0].detach())
        for each in (batch, *(replace(batch, answers=m) for m in (marks, ~marks, marks & ~marks)))
    ]
    every, answers, others = (loss - losses[-1] for loss in losses[:-1])  # less the noisy part
    assert min(answers, others) > 0.0
    assert answers + others == pytest.approx(every)


# --- what rows hold -------------------------------------------------------------------------------


def test_the_last_block_of_an_answer_is_filled_and_a_turn_starts_a_new_one(tmp_path):
    rows = sequences(tmp_path, [FIRST], 20, block_sizes=(4,)).rows([0])
    first, second = [0, 1, 2, 5, END, END, END, END], [6, 7, 8, 0, 2, END, END, END]
    assert rows.tokens.tolist() == [[*first, *second, *[PAD] * 4]]
    marks = [[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [0] * 4]
    assert rows.scored.astype(int).tolist() == [[mark for span in marks for mark in span]]
    assert rows.answer_tokens.tolist() == [4]


def test_a_full_sequence_has_one_turn_and_nothing_of_later_ones(tmp_path):
    rows = sequences(tmp_path, [FIRST], 16)
    found = rows.rows(range(40), whole=True)
    kinds = {
        tuple(tokens): tuple(scored)
        for tokens, scored in zip(found.tokens.tolist(), found.scored.tolist(), strict=True)
    }
    one = (0, 1, 2, 5, *[END] * 12)
    both = (0, 1, 2, 5, END, 6, 7, 8, 0, 2, *[END] * 6)
    assert kinds == {
        one: (False,) * 2 + (True,) * 14,
        both: (False,) * 8 + (True,) * 8,
    }
    assert np.array_equal(rows.rows([17], whole=True).tokens, found.tokens[17:18])
    assert rows.answer_tokens(range(40), whole=True) == found.answer_tokens.sum() == 80
