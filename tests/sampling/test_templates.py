"""Text that is given anywhere: it stays, holes are filled, and rows depend on nothing else."""

import pytest
import torch
from engines import generate
from test_rules import FITS, family_of
from tiny_models import CLEAN, tiny_family, tiny_model

from textdiff.diffusion.objectives.mdlm import MDLM
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.template import pieces_of

A, B, C = CLEAN[1], CLEAN[3], CLEAN[6]
PROMPTS = [
    [None, None, A, None, B],
    [A, B, None, C, C, C, C, C, C, A, None, B],
    [],
    [None, A] + [B] * 11 + [None],
    [A, A, None, None, None, B, None, C],
    [C] * 6 + [None, A],
]
NEW = [0, 0, 9, 0, 3, 2]
HOT = Controls(temperature=2.0)
END = CLEAN[5]


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


@pytest.fixture(scope="module")
def attentive():
    """Four layers that look at many places at once, so that one that is missing shows."""
    model = tiny_model(adaln=True, time_conditioning=True)
    model.blocks.extend(tiny_model(1, adaln=True, time_conditioning=True).blocks)
    model.config.num_hidden_layers = len(model.blocks)
    for layer, block in enumerate(model.blocks):
        block.layer = layer
        block.attn_qkv.weight.data.mul_(0.3)
    return model


def rows_of(model, family, job, rule, controls=HOT, **options):
    *_, last = generate(model, family, job, rule=rule, steps=3, controls=controls, **options)
    return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]


CASES = [
    (case, rule)
    for case in ("mdlm", "sedd", "udlm", "gidd")
    for rule in sorted(FITS[case])
    if case != "sedd" or rule in ("euler", "tweedie", "remask")
]


@pytest.mark.parametrize(("case", "rule"), CASES)
@pytest.mark.parametrize("size", [None, 4, 1])
def test_given_tokens_stay_in_any_batch_cached_or_not(model, case, rule, size):
    family, job = family_of(case).with_block_size(size), Job(PROMPTS, NEW, seed=5)
    together = rows_of(model, family, job, rule)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        assert len(together[row]) == len(prompt) + new
        assert set(together[row]) <= set(CLEAN)
        for token, now in zip(prompt, together[row], strict=False):
            assert token in (None, now)
    for row in (1, 4):
        one = Job([PROMPTS[row]], [NEW[row]], first_row=row, seed=5)
        assert rows_of(model, family, one, rule) == [together[row]]
    assert rows_of(model, family, job, rule, slots=2) == together
    if size is not None:
        assert rows_of(model, family, job, rule, cache=True, slots=3) == together


@pytest.mark.parametrize("window", [4, 8])
def test_given_blocks_are_stored_in_a_ring_without_a_call_of_a_rule(window):
    """What one layer stores has seen nothing, so a window is exact in a cache, too."""
    model = tiny_model()
    del model.blocks[1]
    model.config.num_hidden_layers = 1
    family = tiny_family(4)
    job = Job([[None] + [A, B, C] * 8 + [None], [None] * 3 + [B] * 9], [5, 4], seed=2)
    plain = rows_of(model, family, job, "first_hitting", window=window)
    assert rows_of(model, family, job, "first_hitting", window=window, cache=True) == plain
    assert rows_of(model, family, job, "first_hitting") != plain


@pytest.mark.parametrize("window", [4, 8, None])
def test_given_blocks_are_stored_as_those_of_a_prompt(attentive, window, monkeypatch):
    """What is behind a hole is, once that is filled, what a longer prompt is: to the logits."""
    predict, seen = MDLM.predict, []

    def watched(self, logits, xt, alpha):
        seen.append(logits)
        return predict(self, logits, xt, alpha)

    monkeypatch.setattr(MDLM, "predict", watched)
    family, options = tiny_family(4), {"window": window, "cache": True}
    job = Job([[None] + [A, B, C] * 8 + [None]], [0], seed=2)
    row = rows_of(attentive, family, job, "first_hitting", **options)[0]
    prompt = Job([row[:25]], [1], seed=2)
    assert rows_of(attentive, family, prompt, "first_hitting", **options)[0] == row
    assert len(seen) == 3
    torch.testing.assert_close(seen[1], seen[2], rtol=0, atol=1e-10)


def test_blocks_without_a_hole_take_no_call(model):
    family = tiny_family(4)
    job = Job([[None] + [A] * 15 + [None]], [0])
    for cache in (False, True):
        steps = list(
            generate(model, family, job, rule="ancestral", steps=9, controls=HOT, cache=cache)
        )
        assert [step.changed.tolist() for step in steps] == [[0], [16]]
        assert steps[1].final.tolist() == [16]
        assert steps[1].calls == 2


def test_a_full_sequence_sees_what_follows_and_a_block_does_not(model):
    def first(family, last: int) -> int:
        job = Job([[None, A, A, A, A, last]], [0])
        return rows_of(model, family, job, "ancestral", Controls(temperature=0.0))[0][0]

    assert len({first(tiny_family(4), last) for last in CLEAN}) == 1
    assert len({first(tiny_family(), last) for last in CLEAN}) > 1


@pytest.mark.parametrize("case", ["mdlm", "gidd"])
def test_text_does_not_end_where_more_is_given(model, case):
    """The end token is drawn in open ends alone, and there not before so many tokens."""
    family = family_of(case).with_block_size(4)
    keen = Controls(
        end_tokens=(END,),
        min_new_tokens=2,
        hooks=(lambda context, log_x0: push(log_x0, END, 30.0),),
    )
    job = Job([[A, None, B, None], [None, B], []], [3, 0, 4], seed=1)
    rows = rows_of(model, family, job, "ancestral", keen)
    assert rows[0][1] != END
    assert rows[1][0] != END
    assert END not in rows[0][3:5]
    assert END not in rows[2][:2]
    assert rows[0][5:] == [END] * 2
    assert rows[2][2:] == [END] * 2


def push(log_x0, token, nats):
    column = torch.tensor([token])
    return log_x0.index_add(-1, column, torch.full_like(log_x0[:, :1], nats))


def test_ends_are_looked_for_in_open_ends_alone(model):
    family, told = tiny_family(4), []

    def ended(new, fresh):
        told.append((list(new), fresh))
        return False

    job = Job([[A, None, B, B, B, None], [C, None, A]], [7, 0], ended=ended)
    row = rows_of(model, family, job, "ancestral")[0]
    assert told == [(row[5:8], 3), (row[5:12], 4)]


def test_rows_that_end_in_an_open_end_leave_what_was_given(model):
    family = tiny_family(4)
    job = Job([[A, None, B], [None, B]], [40, 0], ended=lambda new, fresh: True)
    walk = generate(model, family, job, rule="ancestral", steps=2, controls=HOT)
    assert lengths_of(walk).tolist() == [4, 2]


def lengths_of(walk):
    while True:
        try:
            next(walk)
        except StopIteration as stop:
            return stop.value


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("The [MASK:5] sat", ["The ", 5, " sat"]),
        ("[MASK]x[MASK: 12 ]", [1, "x", 12]),
        ("[MASK:2][MASK:3]", [2, 3]),
        ("no [mask] here, [MASKS] neither", ["no [mask] here, [MASKS] neither"]),
        (r"a \[MASK] and \[MASK:3] but [MASK]", ["a [MASK] and [MASK:3] but ", 1]),
        ("", []),
    ],
)
def test_holes_are_found(text, pieces):
    assert pieces_of(text) == pieces


@pytest.mark.parametrize("hole", ["[MASK:5 sat", "[MASK 5]", "[MASK5]", "[MASK"])
def test_what_was_meant_to_be_a_hole_is_no_text(hole):
    with pytest.raises(ConfigError) as error:
        pieces_of("The [MASK:3] or " + hole)
    assert error.value.code == "not_a_hole"
    assert pieces_of("The \\" + hole) == ["The " + hole]


@pytest.mark.parametrize(
    "hole",
    ["[MASK:0]", "[MASK:x]", "[MASK:]", "[MASK:-3]", "[MASK:1.5]", "[MASK:10000001]", "[MASK:²]"],
)
def test_holes_without_a_length_are_refused(hole):
    with pytest.raises(ConfigError) as error:
        pieces_of("ab" + hole)
    assert error.value.code == "wrong_length_of_hole"
