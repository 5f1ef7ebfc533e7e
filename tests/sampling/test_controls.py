"""What departs from the model's law departs as it says, and by hand-computed numbers."""

from itertools import permutations

import pytest
import torch
from engines import generate
from exact_stats import chi_square_p
from exact_tables import CLEAN as KINDS
from exact_tables import MASK as MASK_OF_TABLE
from exact_tables import all_sequences, code
from rule_worlds import conditionals, keyed, reader, run, truth
from test_rules import FITS, KNOBS, family_of, holes, walk
from tiny_models import CLEAN, MASK, tiny_family, tiny_model

from textdiff.diffusion.process import Vocabulary
from textdiff.errors import ConfigError
from textdiff.sampling.context import Context, SegmentInfo
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules.first_hitting import FirstHitting
from textdiff.sampling.settings import SamplingConfig

VOCABULARY = Vocabulary.of(4, 3)
P = torch.tensor([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)


def law(controls: Controls, context: Context | None = None) -> torch.Tensor:
    return controls.log_probabilities(P.log(), context).exp()


def context(canvas, positions, t=(1.0,), info=None) -> Context:
    canvas = torch.tensor(canvas)
    at = Positions.of(torch.tensor(positions), canvas)
    return Context(canvas, at, torch.tensor(t).double(), VOCABULARY, info)


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    kept = law(Controls(min_p=0.4))
    assert kept[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0.0, 0.0])
    assert kept[1].tolist() == pytest.approx([0.0, 2 / 9, 3 / 9, 4 / 9])
    assert torch.equal(law(Controls(min_p=0.0)), law(Controls()))
    hot = law(Controls(temperature=2.0, min_p=0.6))  # the share is that of tempered ones
    assert (hot[0] > 0).tolist() == [True, True, False, False]


def test_a_temperature_falls_with_time():
    both = context([[3, 3], [3, 3]], [0, 3], t=(1.0, 0.25))
    found = law(Controls(temperature=(0.8, 0.4)), both)
    for row, heat in enumerate((0.8, 0.5)):
        expected = P[row] ** (1 / heat)
        assert (found[row] - expected / expected.sum()).abs().max() < 1e-12
    frozen = Controls(temperature=(1.0, 0.0))
    last = context([[3, 3], [3, 3]], [0, 3], t=(0.0, 0.0))
    u = torch.full((2,), 0.999, dtype=torch.float64)
    assert draw_tokens(P.log(), u, frozen, last).tolist() == [0, 3]
    assert torch.equal(law(Controls(temperature=(0.7, 0.7)), both), law(Controls(temperature=0.7)))


def test_repetition_is_penalised_by_what_the_row_has_elsewhere():
    """Row 0 has token 1 before its canvas and 0 in it; row 1 has 3 twice, once behind its end."""
    info = SegmentInfo(
        text=torch.tensor([[1, 1, 2, 2], [2, 2, 0, 0]]),
        starts=torch.tensor([2, 0]),
        lengths=torch.tensor([4, 2]),
        given=torch.zeros(2, 4, dtype=torch.bool),
        tails=torch.tensor([0, 0]),
    )
    canvas = [[9, 0, 2], [9, 9, 3]]
    controls = Controls(repetition_penalty=1.5).within(info)
    wide = torch.cat([P, torch.zeros(2, 6, dtype=torch.float64)], 1)
    at = context(canvas, [0, 3], t=(1.0, 1.0))
    found = controls.log_probabilities(wide.log(), at).exp()
    expected = P.clone()
    expected[0, [0, 1]] = expected[0, [0, 1]] ** 1.5
    expected = expected / expected.sum(1, keepdim=True)
    assert (found[:, :4] - expected).abs().max() < 1e-12
    own = context(
        [[2, 0, 9], [9, 9, 9]], [0, 3], t=(1.0, 1.0)
    )  # what stands there is no repetition
    found = controls.log_probabilities(wide.log(), own).exp()
    assert (found[0, :4] - expected[0]).abs().max() < 1e-12


def test_banned_tokens_are_never_drawn_and_the_others_keep_their_proportions():
    at = context([[9, 9]], [0, 1])
    assert law(Controls(banned=(0, 3)), at)[0].tolist() == pytest.approx([0, 5 / 8, 3 / 8, 0])
    u = torch.tensor([0.0, 0.999], dtype=torch.float64)
    assert draw_tokens(P.log(), u, Controls(banned=(0, 3)), at).tolist() == [1, 2]
    assert draw_tokens(P.log(), u, Controls(temperature=0.0, banned=(0, 3)), at).tolist() == [1, 2]


def test_hooks_come_first_and_are_told_where():
    seen = []

    def hook(where: Context, log_x0):
        seen.append((where.row.tolist(), where.column.tolist(), where.place.tolist()))
        return log_x0 + torch.tensor([0.0, 5.0, 0.0, 0.0])

    at = context([[9, 9, 9], [9, 9, 9]], [2, 3], t=(1.0, 1.0))
    assert draw_tokens(P.log(), P[:, 0], Controls(hooks=(hook,), top_k=1), at).tolist() == [1, 1]
    assert seen == [([0, 1], [2, 0], [2, 0])]


@pytest.mark.parametrize(
    ("hook", "said"),
    [
        (lambda context, log_x0: None, "returned NoneType"),
        (lambda context, log_x0: log_x0[:, :2], "of the shape that it was given, (2, 4)"),
        (lambda context, log_x0: log_x0 - torch.inf, "without any token"),
        (lambda context, log_x0: log_x0 * torch.nan, "without any token"),
    ],
)
def test_hooks_that_return_nothing_to_draw_from_are_named(hook, said):
    with pytest.raises(ConfigError, match=r"^hook <lambda> ") as caught:
        draw_tokens(P.log(), P[:, 0], Controls(hooks=(hook,)), context([[9, 9]], [0, 1]))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": (1.0, -0.1)},
        {"temperature": float("nan")},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"min_new_tokens": -1},
    ],
)
def test_values_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))} .*: give "):
        Controls(**wrong)


def test_temperatures_as_they_are_written():
    for written, pair in (("0.5", (0.5, 0.5)), ("0.8:0.4", (0.8, 0.4)), ((0.8, 0.4), (0.8, 0.4))):
        assert SamplingConfig(temperature=written).temperatures == pair
    for wrong in ("warm", "1:2:3", ":", "0.8:"):
        with pytest.raises(ConfigError, match="give a number, or two as FIRST:LAST"):
            SamplingConfig().merge(temperature=wrong)


# --- in every rule --------------------------------------------------------------------------------

WALKS = [
    (case, name, knobs)
    for case, names in FITS.items()
    for name in sorted(names)
    for knobs in ({}, *KNOBS.get(name, [])[:1])
]
EVERY = pytest.mark.parametrize(
    ("case", "name", "knobs"), WALKS, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(WALKS)]
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


@EVERY
def test_bans_hold_in_every_rule(model, case, name, knobs):
    text, frozen = holes(8, 9)
    banned = CLEAN[2:]
    steps, _ = walk(
        model, case, name, knobs, torch.arange(8), text, frozen, controls=Controls(banned=banned)
    )
    assert not torch.isin(steps[-1].canvas[~frozen], torch.tensor(banned)).any()
    assert torch.isin(steps[-1].canvas[~frozen], torch.tensor(CLEAN[:2])).all()


@EVERY
def test_controls_that_see_the_row_do_not_see_its_company(model, case, name, knobs):
    text, frozen = holes(6, 9, seed=2)
    controls = Controls(temperature=(1.5, 0.5), repetition_penalty=1.7, min_p=0.05)
    together, _ = walk(model, case, name, knobs, torch.arange(6), text, frozen, controls=controls)
    for row in (1, 4):
        one = slice(row, row + 1)
        alone, _ = walk(
            model, case, name, knobs, torch.tensor([row]), text[one], frozen[one], controls=controls
        )
        assert torch.equal(alone[-1].canvas, together[-1].canvas[one])


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("rule", ["ancestral", "confidence", "remask"])
def test_controls_do_not_depend_on_batch_or_cache(model, size, rule):
    family = tiny_family(size)
    job = Job([[], [CLEAN[0]] * 5, [None, CLEAN[1], None]], [9, 6, 8], seed=3)
    controls = Controls(
        temperature=(1.3, 0.6), repetition_penalty=2.0, end_tokens=(CLEAN[4],), min_new_tokens=3
    )

    def rows(job, **options):
        *_, last = generate(model, family, job, rule=rule, steps=4, controls=controls, **options)
        return [row[:n].tolist() for row, n in zip(last.canvas, job.lengths.tolist(), strict=True)]

    together = rows(job)
    assert rows(job, slots=2) == together
    if size is not None:
        assert rows(job, cache=True, slots=2) == together
    for row in range(3):
        one = Job([job.prompts[row]], [job.new_tokens[row]], first_row=row, seed=3)
        assert rows(one) == [together[row]]


def test_one_token_per_call_with_a_penalty_follows_the_chain_of_penalised_conditionals():
    """First hitting on a table of four tokens, the penalty applied by hand along every path."""
    joint, _ = truth()
    table, rows, penalty = conditionals(joint), 20_000, 2.0
    canvas = torch.full((rows, 4), MASK_OF_TABLE)
    steps = run(
        FirstHitting(),
        reader(table),
        canvas,
        keyed(rows, 4),
        1,
        controls=Controls(repetition_penalty=penalty),
    )
    expected = torch.zeros(len(KINDS) ** 4, dtype=torch.float64)
    texts = all_sequences(4)
    for order in permutations(range(4)):
        chance = torch.ones(len(texts), dtype=torch.float64)
        state = torch.full_like(texts, MASK_OF_TABLE)
        for place in order:
            log_p = table.log_p[code(state), place].clone()
            for kind in KINDS:
                seen = (state == kind).any(1)
                log_p[seen, kind] *= penalty
            chance *= log_p.softmax(-1).gather(1, texts[:, place : place + 1])[:, 0]
            state[:, place] = texts[:, place]
        expected += chance / 24
    assert float(expected.sum()) == pytest.approx(1.0)
    index = {tuple(text): i for i, text in enumerate(texts.tolist())}
    found = [index[tuple(row)] for row in steps[-1].canvas.tolist()]
    counts = torch.bincount(torch.tensor(found), minlength=len(texts)).double()
    assert chi_square_p(counts, expected * rows) > 1e-3
    assert chi_square_p(counts, joint * rows) < 1e-6


def test_neutral_controls_are_told_from_others():
    assert Controls().neutral
    assert Controls(end_tokens=(3,)).neutral
    for other in (
        Controls(temperature=0.9),
        Controls(min_p=0.1),
        Controls(banned=(1,)),
        Controls(repetition_penalty=1.1),
        Controls(hooks=(print,)),
    ):
        assert not other.neutral
    assert family_of("mdlm").process.mask_token_id == MASK
