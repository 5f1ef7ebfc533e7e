"""Generation with a real network in float64: what a row becomes depends on its own keys alone."""

from itertools import count

import pytest
import torch
from engines import alone, generate
from tiny_models import CLEAN, EXCLUDED, MASK, tiny_family, tiny_model

from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import PlainPredictor
from textdiff.sampling.rules.ancestral import Ancestral, reveal_steps
from textdiff.sampling.segment import Segment

PROMPTS = [[], [0, 5, 2], [1, 1, 8, 7, 3], [6], [2, 0, 3, 3, 5, 6, 7, 8, 0]]
NEW = [6, 4, 7, 16 - 1, 2]
FREE = Controls()


@pytest.fixture(scope="module", params=["time-free", "time-conditioned"])
def model(request):
    if request.param == "time-free":
        return tiny_model()
    return tiny_model(adaln=True, time_conditioning=True)


def steps_of(model, family, job, steps=5, controls=FREE):
    walk = generate(model, family, job, rule="ancestral", steps=steps, controls=controls)
    return list(walk)


def rows_of(model, family, job, steps=5, controls=FREE) -> list[list[int]]:
    """The finished rows, without their padding."""
    canvas = steps_of(model, family, job, steps, controls)[-1].canvas
    return [row[:n].tolist() for row, n in zip(canvas, job.lengths.tolist(), strict=True)]


BLOCKS = pytest.mark.parametrize("block_size", [None, 4, 1])


@BLOCKS
def test_a_row_does_not_depend_on_who_shares_its_batch(model, block_size):
    family = tiny_family(block_size)
    together = rows_of(model, family, Job(PROMPTS, NEW, seed=3))
    alone = [
        rows_of(model, family, Job([prompt], [new], first_row=row, seed=3))[0]
        for row, prompt, new in zip(count(), PROMPTS, NEW, strict=False)
    ]
    assert together == alone
    halves = [
        *rows_of(model, family, Job(PROMPTS[:2], NEW[:2], seed=3)),
        *rows_of(model, family, Job(PROMPTS[2:], NEW[2:], first_row=2, seed=3)),
    ]
    assert together == halves
    strangers = [[8] * 12, PROMPTS[1], [], [], [3]]
    changed = rows_of(model, family, Job(strangers, [4, NEW[1], 1, 1, 1], seed=3))
    assert changed[1] == together[1]


@BLOCKS
def test_rows_differ_by_seed_and_by_index(model, block_size):
    family = tiny_family(block_size)
    hot = Controls(temperature=20.0)  # nearly uniform: two equal rows would be no accident
    rows = rows_of(model, family, Job([[0]] * 6, [12] * 6, seed=3), controls=hot)
    assert len(set(map(tuple, rows))) == 6
    other_seed = rows_of(model, family, Job([[0]] * 6, [12] * 6, seed=4), controls=hot)
    assert not set(map(tuple, rows)) & set(map(tuple, other_seed))


@pytest.mark.parametrize("block_size", [None, 4])
def test_the_order_of_rows_in_a_batch_does_not_matter(model, block_size):
    """The rule over permuted rows, with the uniforms permuted alike, gives the permuted canvas."""
    family = tiny_family(block_size)
    length, steps = 4, 3
    starts = torch.tensor([0, 1, 2, 0, 3, 1])
    lengths = torch.tensor([4, 3, 4, 2, 4, 2])
    canvas = torch.where(torch.arange(length) < starts[:, None], CLEAN[2], MASK)
    at = torch.arange(length)
    frozen = (at < starts[:, None]) | (at >= lengths[:, None])

    def run(order):
        def draws(stream: Stream, step: int):
            return uniforms(0, stream, row=order[:, None], step=step, position=at)

        *_, last = Ancestral()(
            Segment(
                alone(model, family, lengths[order]),
                family.process,
                family.schedule,
                canvas[order],
                steps=steps,
                frozen=frozen[order],
                uniforms=draws,
                controls=FREE,
            )
        )
        return last.canvas

    order = torch.tensor([4, 1, 5, 0, 3, 2])
    assert torch.equal(run(torch.arange(6))[order], run(order))


@BLOCKS
def test_prompts_stay_masks_vanish_and_only_clean_tokens_appear(model, block_size):
    family = tiny_family(block_size)
    job = Job(PROMPTS, NEW, seed=1)
    for step in steps_of(model, family, job):
        for row, prompt in enumerate(PROMPTS):
            assert step.canvas[row, : len(prompt)].tolist() == prompt
        assert not torch.isin(step.canvas, torch.tensor(EXCLUDED)).any()
    for row, length in enumerate(job.lengths.tolist()):
        assert torch.isin(step.canvas[row, :length], torch.tensor(CLEAN)).all()
        assert (step.canvas[row, length:] == MASK).all()  # padding is not generated


def test_frozen_positions_never_change_wherever_they_are(model):
    """Through the rule itself, which knows no prompts: any set of positions, holding anything."""
    family, rows, length = tiny_family(), 30, 8
    generator = torch.Generator().manual_seed(1)
    frozen = torch.rand(rows, length, generator=generator) < 0.4
    frozen[0], frozen[1] = True, False
    known = torch.randint(len(CLEAN), (rows, length), generator=generator)
    canvas = torch.where(frozen, torch.tensor(CLEAN)[known], MASK)
    canvas[2, frozen[2]] = MASK  # a frozen mask stays one

    def draws(stream: Stream, step: int):
        row = torch.arange(rows)[:, None]
        return uniforms(0, stream, row=row, step=step, position=torch.arange(length))

    walk = Ancestral()(
        Segment(
            alone(model, family, torch.full((rows,), length)),
            family.process,
            family.schedule,
            canvas,
            steps=4,
            frozen=frozen,
            uniforms=draws,
            controls=FREE,
        )
    )
    for step in walk:
        assert torch.equal(step.canvas[frozen], canvas[frozen])
    assert torch.isin(step.canvas[~frozen], torch.tensor(CLEAN)).all()


class CountingModel:
    """A model that counts its calls and the rows they carry."""

    def __init__(self, model):
        self.model, self.calls, self.rows = model, 0, 0
        self.context, self.device = model.context, model.device
        self.self_conditioning = None

    def __call__(self, tokens, **rest):
        self.calls += 1
        self.rows += len(tokens)
        return self.model(tokens, **rest)


def scheduled(family, row: int, length: int, steps: int, seed: int) -> list[int]:
    """The reveal step of every position of a promptless row."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    u = uniforms(seed, Stream.POSITION, row=row, position=torch.arange(length))
    return reveal_steps(family.schedule.alpha(times), u).tolist()


@pytest.mark.parametrize("steps", [1, 3, 16, 1000])
def test_calls_are_the_distinct_reveal_steps_of_each_row(model, steps):
    family = tiny_family()
    for row in range(5):
        counting = CountingModel(model)
        last = steps_of(counting, family, Job([[]], [9], first_row=row), steps)[-1]
        distinct = len(set(scheduled(family, row, 9, steps, 0)))
        assert last.calls == counting.calls == distinct
    counting = CountingModel(model)
    last = steps_of(counting, family, Job([[]] * 5, [9] * 5), steps)[-1]
    distinct = [len(set(scheduled(family, row, 9, steps, 0))) for row in range(5)]
    assert last.calls == counting.calls == max(distinct)  # rows do not wait for each other
    assert counting.rows == sum(distinct)


def test_blocks_count_their_calls_together(model):
    counting = CountingModel(model)
    walk = steps_of(counting, tiny_family(4), Job([[0, 2]], [9]), steps=64)
    assert [step.calls for step in walk] == list(range(1, counting.calls + 1))
    assert [step.index for step in walk] == list(range(counting.calls))


def test_a_row_waits_at_no_time_of_its_own(model):
    """`Step.t` is each row's own time and falls along the walk."""
    walk = steps_of(model, tiny_family(), Job([[]] * 4, [9] * 4), steps=50)
    times = torch.stack([step.t for step in walk])
    assert (times.diff(dim=0) <= 0).all()
    assert (times[0] > 0).all()
    assert len({tuple(row) for row in times.T.tolist()}) == 4


def test_greedy_decoding_is_the_most_likely_token_given_what_is_revealed():
    model, family = tiny_model(), tiny_family()
    before = torch.tensor([[3, *[MASK] * 7]])
    greedy = Controls(temperature=0.0)
    for step in steps_of(model, family, Job([[3]], [7]), 4, greedy):
        logits = model(before).logits[0].detach()
        allowed = logits.masked_fill(~family.process.vocabulary.clean, -torch.inf)
        best = torch.where(before[0] == MASK, allowed.argmax(-1), before[0])
        now = step.canvas[0] != MASK
        assert torch.equal(step.canvas[0][now], best[now])
        before = step.canvas


def test_block_generation_ignores_what_comes_after_the_block(model):
    """Asking for more tokens does not change the earlier blocks."""
    family = tiny_family(4)
    short = rows_of(model, family, Job([[5, 0]], [6]))[0]
    longer = rows_of(model, family, Job([[5, 0]], [14]))[0]
    assert longer[:8] == short


# --- identity 30 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"adaln": True}], ids=["plain", "adaln"])
@BLOCKS
def test_a_time_free_network_never_feels_the_noise_level(settings, block_size, monkeypatch):
    model, family = tiny_model(**settings), tiny_family(block_size)
    x = torch.tensor([[0, MASK, 3, MASK, 2]])
    plain = model(x).logits
    for sigma in (0.0, 0.3, 50.0, torch.inf):
        assert torch.equal(model(x, sigma=torch.tensor([sigma])).logits, plain)
    job = Job(PROMPTS, NEW, seed=3)
    expected = rows_of(model, family, job)
    told = PlainPredictor._sigma
    monkeypatch.setattr(PlainPredictor, "_sigma", lambda self, a, *at: 7.0 + told(self, a / 2, *at))
    assert rows_of(model, family, job) == expected


def test_a_time_conditioned_network_does_feel_it():
    model = tiny_model(adaln=True, time_conditioning=True)
    x = torch.tensor([[0, MASK, 3, MASK, 2]])
    low, high = (model(x, sigma=torch.tensor([s])).logits for s in (0.1, 2.0))
    assert (low - high).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["loglinear", "cosine", "polynomial", "geometric"])
@BLOCKS
def test_a_time_conditioned_network_gets_finite_noise_levels_from_the_first_step_on(
    kind, block_size, monkeypatch
):
    """At t = 1 an ideal schedule has sigma = infinity, whose sinusoids are NaN."""
    model = tiny_model(adaln=True, time_conditioning=True)
    forward = type(model).forward
    seen = []

    def watched(self, *args, **rest):
        result = forward(self, *args, **rest)
        seen.append((rest["sigma"], result.logits))
        return result

    monkeypatch.setattr(type(model), "forward", watched)
    steps_of(model, tiny_family(block_size, kind), Job(PROMPTS, NEW), steps=3)
    assert all(sigma.isfinite().all() for sigma, _ in seen)
    assert all(logits.isfinite().all() for _, logits in seen)
