"""Rows whose beginning is given or hidden: which they are, what they cost, and what is refused."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from exact_tables import (
    CLEAN,
    EXCLUDED,
    MASK,
    ROWS,
    TableDenoiser,
    all_sequences,
    oracle,
    random_joint,
)
from pydantic import ValidationError
from torch import Tensor

from textdiff.config import Config
from textdiff.diffusion.family import Blocks, build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import PositionTerms
from textdiff.train.batches import TrainingBatches
from textdiff.train.prompts import Prompts, scored_share

LENGTH, COUNT = 4, 6000
TEXT = torch.tensor([CLEAN[0], CLEAN[2], CLEAN[1], CLEAN[2]])


def config(noise: dict, **diffusion) -> Config:
    raw = {
        "data": {"sequence_length": LENGTH},
        "model": {"adaln": True, "time_conditioning": diffusion.get("process") == "uniform"},
        "diffusion": {"noise": noise, **diffusion},
        "train": {"global_batch_size": COUNT, "micro_batch_size": COUNT},
        "sample": {"max_new_tokens": 4},
    }
    return Config.model_validate(raw)


def batches(prompts=0.5, dropout=0.5, **diffusion) -> TrainingBatches:
    """Rows that are all the same text."""
    settings = config({"prompts": prompts, "prompt_dropout": dropout}, **diffusion)
    spec = settings.diffusion.model_dump(mode="json")
    family = build_family(spec, Vocabulary.of(ROWS, MASK, [EXCLUDED]))

    def rows(samples):
        return SimpleNamespace(tokens=TEXT.repeat(len(samples), 1).numpy(), documents=None)

    return TrainingBatches(SimpleNamespace(rows=rows), family, settings)


def kinds(given: Tensor, hidden: Tensor) -> dict[tuple, list[int]]:
    """Rows by the positions that are given, and whether they are hidden."""
    found = defaultdict(list)
    for row, (some, gone) in enumerate(zip(given.tolist(), hidden.any(1).tolist(), strict=True)):
        found[tuple(i for i, one in enumerate(some) if one), gone].append(row)
    return found


def log_p(joint: Tensor, *positions: int) -> float:
    """Log-probability of the text's tokens at some positions."""
    fits = (all_sequences(LENGTH) == TEXT)[:, list(positions)].all(1)
    return float(joint[fits].sum().log())


@pytest.mark.parametrize("size", [None, 2])
def test_a_row_costs_the_rest_of_its_text_with_or_without_the_prompt(size):
    """With true conditionals masked diffusion's bound is the likelihood itself: chain rule."""
    joint = random_joint(5, LENGTH)
    made = batches(block_size=size)
    batch = made[0]
    drawn = made.prompts(torch.arange(COUNT), made.family.blocks(LENGTH))
    nats = PositionTerms(TableDenoiser(oracle(joint, LENGTH)), made.family, batch).all()
    rows = torch.zeros(COUNT).double().index_add(0, batch.positions // LENGTH, nats)
    seen = kinds(drawn.given, drawn.hidden)
    assert len(seen) == (7 if size is None else 4)
    for (given, hidden), members in seen.items():
        expected = (
            log_p(joint, *(set(range(LENGTH)) - set(given)))
            if hidden
            else log_p(joint, *range(LENGTH))
        )
        if given and not hidden:  # in blocks, what comes before the prompt's block is scored
            expected -= log_p(joint, *range(given[-1] + 1)) - log_p(joint, *range(given[0]))
        some = rows[members]
        error = float(some.std()) / len(members) ** 0.5
        assert abs(float(some.mean()) + expected) < 4.0 * error + 1e-9


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_what_is_given_is_clean_or_masked_and_free(process):
    kind = {"absorbing": "mdlm", "uniform": "udlm"}[process]
    made = batches(process=process, objective={"kind": kind})
    batch = made[0]
    drawn = made.prompts(torch.arange(COUNT), made.family.blocks(LENGTH))
    shown = drawn.given & ~drawn.hidden
    assert torch.equal(batch.xt[shown], batch.x0[shown])
    assert (batch.xt[drawn.hidden] == MASK).all()
    assert (batch.x0[drawn.hidden] == MASK).all()  # for blocks that look back
    scored = torch.zeros(COUNT * LENGTH, dtype=torch.bool).index_fill(0, batch.positions, True)
    assert not (scored.view(COUNT, LENGTH) & drawn.given).any()
    if process == "uniform":  # everything else costs, and is no mask
        assert torch.equal(scored.view(COUNT, LENGTH), ~drawn.given)
        assert (batch.xt[~drawn.given] != MASK).all()


@pytest.mark.parametrize("size", [None, 2, 1])
def test_prompts_are_as_many_and_as_long_as_said(size):
    u = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = Blocks.of(LENGTH, size)
    drawn = Prompts.draw(u, blocks, 0.6, 0.25)
    share = scored_share(blocks, 0.6)
    assert float((~drawn.given).double().mean()) == pytest.approx(share, abs=0.01)
    if size is None:
        lengths = drawn.given.sum(1).bincount(minlength=LENGTH) / len(u)
        assert lengths.tolist() == pytest.approx([0.55, 0.15, 0.15, 0.15], abs=0.01)
        hidden = float(drawn.hidden.any(1).double().mean())
        assert hidden == pytest.approx(0.6 * 0.25 * 0.75, abs=0.01)
        assert (drawn.given.long().diff(dim=1) <= 0).all()  # always the beginning
    if size == 2:
        assert set(drawn.given.nonzero()[:, 1].tolist()) == {0, 2}
        assert set(drawn.hidden.nonzero()[:, 1].tolist()) == {0}


def test_without_prompts_nothing_changes_and_with_them_the_loss_counts_what_is_scored():
    plain, given = batches(0.0, 0.0), batches(1.0, 0.0)
    assert plain.prompts(torch.arange(4), plain.family.blocks(LENGTH)) is None
    assert plain.scored_tokens(plain[0]) == COUNT * LENGTH
    assert given.scored_tokens(given[0]) == COUNT * LENGTH * (1.0 - 1.5 / 4)


def test_prompts_do_not_know_how_the_batch_is_split():
    made = batches()
    whole, part = made.batch(3, torch.arange(40)), made.batch(3, torch.arange(20, 40))
    assert torch.equal(whole.xt[20:], part.xt)


@pytest.mark.parametrize(
    ("noise", "diffusion", "sentence"),
    [
        ({"prompt_dropout": 0.1}, {}, "hides prompts, and there are none"),
        (
            {"prompts": 0.5, "draw": "time"},
            {"schedule": {"kind": "learned"}},
            "a learned schedule is trained on whole texts",
        ),
        ({"prompts": 0.5}, {"block_size": 1}, "blocks of one token"),
    ],
)
def test_prompts_without_a_meaning_are_refused(noise, diffusion, sentence):
    with pytest.raises(ValidationError, match=sentence):
        config(noise, **diffusion)
