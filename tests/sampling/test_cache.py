"""Generation with a KV cache is generation without one, token for token."""

from dataclasses import replace

import pytest
import torch
from engines import generate
from test_generate_dense import family_of
from tiny_models import CLEAN, CONTEXT, MASK, tiny_family, tiny_model

from textdiff.diffusion.objectives import OBJECTIVES
from textdiff.diffusion.objectives.mdlm import MDLM
from textdiff.errors import ConfigError
from textdiff.models import CAUSAL, Layout
from textdiff.sampling.cached import CachedPredictor
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job

FREE = Controls(temperature=1.5)  # not so sure of itself that wrong logits would not show
PROMPTS = [[], [CLEAN[3]] * 9, [CLEAN[1], CLEAN[2]], [CLEAN[3]] * 9, [CLEAN[5]] * 4, [CLEAN[0]] * 5]
NEW = [17, 6, 1, 12, 4, 23]  # to beyond what the network was trained on


@pytest.fixture(scope="module", params=["time-free", "time-conditioned"])
def model(request):
    if request.param == "time-free":
        return tiny_model()
    return tiny_model(adaln=True, time_conditioning=True)


def rows_of(model, family, job, steps=3, rule="ancestral", **options) -> list[list[int]]:
    walk = generate(model, family, job, rule=rule, steps=steps, controls=FREE, **options)
    canvas = list(walk)[-1].canvas
    return [row[:n].tolist() for row, n in zip(canvas, job.lengths.tolist(), strict=True)]


BLOCKS = pytest.mark.parametrize("size", [1, 4, 8])


@BLOCKS
@pytest.mark.parametrize(("rule", "steps"), [("ancestral", 3), ("first_hitting", 1)])
@pytest.mark.parametrize("slots", [None, 2, 1])
def test_cached_is_uncached(model, size, rule, steps, slots):
    family, job = tiny_family(size), Job(PROMPTS, NEW, seed=5)
    plain = rows_of(model, family, job, steps, rule)
    assert rows_of(model, family, job, steps, rule, cache=True, slots=slots) == plain
    assert all(MASK not in row for row in plain)


@BLOCKS
def test_each_row_of_a_ragged_batch_is_that_row_alone(model, size):
    family = tiny_family(size)
    together = rows_of(model, family, Job(PROMPTS, NEW, seed=5), cache=True, slots=3)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW, strict=True)):
        job = Job([prompt], [new], first_row=row, seed=5)
        assert rows_of(model, family, job, cache=True) == [together[row]]


@pytest.mark.parametrize("case", ["udlm", "sedd-uniform", "gidd", "d3pm-uniform"])
def test_noise_that_draws_tokens_is_cached_alike(case):
    model = tiny_model(adaln=True, time_conditioning=True)
    family, job = family_of(case, 4), Job(PROMPTS, NEW, seed=5)
    plain = rows_of(model, family, job)
    assert rows_of(model, family, job, cache=True, slots=4) == plain


HOLES = [[None, None, CLEAN[2]] * 3, [CLEAN[1]] * 8 + [None] * 2, [CLEAN[4]] * 4 + [None, CLEAN[6]]]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_outputs_about_the_next_token_are_cached_alike(model, size, guidance):
    """The first token of a block is read at the end of the last one, whichever call stored it."""
    family, job = tiny_family(size, shift=True), Job(PROMPTS + HOLES, [*NEW, 3, 7, 0], seed=5)
    plain = rows_of(model, family, job, guidance=guidance)
    for slots in (None, 2):
        options = {"cache": True, "slots": slots, "guidance": guidance}
        assert rows_of(model, family, job, **options) == plain
    assert rows_of(model, tiny_family(size), job, guidance=guidance) != plain


def test_predictions_agree_at_every_call(model, monkeypatch):
    family, job = tiny_family(4), Job(PROMPTS, NEW, seed=5)
    predict, seen = MDLM.predict, []

    def watched(self, logits, xt, alpha):
        seen.append(logits)
        return predict(self, logits, xt, alpha)

    monkeypatch.setattr(MDLM, "predict", watched)
    steps_of(model, family, job)
    plain = seen[:]
    seen.clear()
    steps_of(model, family, job, cache=True)
    assert len(seen) == len(plain) > 10
    for left, right in zip(seen, plain, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


def steps_of(model, family, job, **options):
    return list(generate(model, family, job, rule="ancestral", steps=3, controls=FREE, **options))


def test_a_block_takes_no_call_of_its_own_to_be_stored(model):
    """Every call of the network reveals something; a prompt costs one call before the first."""
    family = tiny_family(4)
    for prompts, prefills in (([[]] * 3, 0), ([[CLEAN[1]] * 6, [CLEAN[2]] * 9], 1)):
        job = Job(prompts, [12] * len(prompts), seed=1)
        steps = steps_of(model, family, job, cache=True)
        assert all(len(step.changed) for step in steps)
        assert steps[-1].calls == len(steps) + prefills


def test_equal_prompts_are_stored_once(model, monkeypatch):
    family = tiny_family(4)
    run, rows = CachedPredictor._logits, []

    def counting(self, tokens, *rest, **options):
        rows.append(len(tokens))
        return run(self, tokens, *rest, **options)

    monkeypatch.setattr(CachedPredictor, "_logits", counting)
    job = Job([[CLEAN[1]] * 8] * 5 + [[CLEAN[2]] * 8], [4] * 6, seed=1)
    found = rows_of(model, family, job, cache=True)
    assert rows[0] == 2
    monkeypatch.setattr(CachedPredictor, "_logits", run)
    assert found == rows_of(model, family, job)


def test_rows_that_end_leave_and_the_next_ones_take_their_slots(model):
    """An end after three tokens: later blocks of that row are never computed."""
    family = tiny_family(4)
    stop = CLEAN[2]
    job = Job([[]] * 6, [40] * 6, seed=2, ended=lambda new, fresh: stop in new[-fresh:])
    whole = rows_of(model, family, replace(job, ended=None))
    walk, canvas = (
        generate(model, family, job, rule="ancestral", steps=3, controls=FREE, cache=True, slots=2),
        None,
    )
    while True:
        try:
            canvas = next(walk).canvas
        except StopIteration as end:
            lengths = end.value.tolist()
            break
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        first = whole[row].index(stop) if stop in whole[row] else 39
        assert length == (first // 4 + 1) * 4
        assert canvas[row, :length].tolist() == whole[row][:length]
        assert (canvas[row, length:] == MASK).all()


def test_the_left_to_right_model_decodes_from_its_cache():
    """One token per call, each the network's conditional, drawn by inverse CDF."""
    model, family = tiny_model(), tiny_family(1)
    family = replace(family, objective=OBJECTIVES.build("ar").on(family.process))
    job = Job(PROMPTS, NEW, seed=5)
    plain = rows_of(model, family, job, steps=1)
    assert rows_of(model, family, job, steps=1, cache=True, slots=4) == plain
    greedy = generate(
        model,
        family,
        Job([[CLEAN[2]]], [9]),
        rule="ancestral",
        steps=1,
        controls=Controls(temperature=0.0),
        cache=True,
    )
    row = list(greedy)[-1].canvas[0].tolist()
    logits = model(torch.tensor([[MASK, *row[:-1]]]), layout=CAUSAL).logits[0]
    best = torch.tensor(CLEAN)[logits[:, list(CLEAN)].argmax(-1)]
    assert row[1:] == best[1:].tolist()


def test_the_left_to_right_model_may_be_asked_again_about_a_token():
    """A token that is masked again is drawn again, from a cache that holds its place already."""
    model, family = tiny_model(), tiny_family(1)
    family = replace(family, objective=OBJECTIVES.build("ar").on(family.process))
    job = Job(PROMPTS, NEW, seed=5)
    often = {"rule": "remask", "steps": 8, "knobs": {"eta": 1.0}}
    plain = rows_of(model, family, job, **often)
    assert rows_of(model, family, job, cache=True, slots=4, **often) == plain
    *_, last = generate(model, family, job, controls=Controls(), **often)
    assert last.calls > max(NEW)  # there are tokens that were drawn twice


class TestWindow:
    def test_is_exact_while_nothing_has_been_dropped(self, model):
        family, job = tiny_family(4), Job([[], [CLEAN[3]] * 5], [16, 11], seed=5)
        plain = rows_of(model, family, job)
        assert rows_of(model, family, job, cache=True, window=12) == plain

    def test_sees_no_further(self, model):
        """Without a cache it is the network on the window alone."""
        family = tiny_family(4)
        near = rows_of(model, family, Job([[CLEAN[1]] * 12], [4], seed=5), window=8)[0][12:]
        far = [CLEAN[2]] * 4 + [CLEAN[1]] * 8
        assert rows_of(model, family, Job([far], [4], seed=5), window=8)[0][12:] == near
        assert rows_of(model, family, Job([far], [4], seed=5))[0][12:] != near

    def test_the_ring_is_no_larger_than_it_must_be(self, model):
        held = CachedPredictor(model, tiny_family(4), 2, 400, 8)
        assert held.cache.capacity == 16
        assert CachedPredictor(model, tiny_family(4), 2, 12, 8).cache.capacity == 12

    def test_a_network_of_one_layer_sees_the_window_exactly(self):
        """What one layer stores has seen nothing, so dropping what it saw changes nothing."""
        model = one_layer()
        family, job = tiny_family(4), Job(PROMPTS, NEW, seed=5)
        plain = rows_of(model, family, job, window=8)
        assert plain != rows_of(model, family, job)
        for slots in (None, 2):
            assert rows_of(model, family, job, window=8, cache=True, slots=slots) == plain

    def test_outputs_about_the_next_token_see_the_window(self):
        model, family = one_layer(), tiny_family(4, shift=True)
        job = Job(PROMPTS + HOLES, [*NEW, 3, 7, 0], seed=5)
        plain = rows_of(model, family, job, window=8)
        for slots in (None, 2):
            assert rows_of(model, family, job, window=8, cache=True, slots=slots) == plain

    @pytest.mark.parametrize("window", [3, 6, -4])
    def test_out_of_range_is_refused(self, model, window):
        with pytest.raises(ConfigError) as error:
            rows_of(model, tiny_family(4), Job([[]], [4]), window=window)
        assert error.value.code in ("window_not_in_blocks", "greater_than_equal")

    def test_means_nothing_to_a_full_sequence_model(self, model):
        with pytest.raises(ConfigError) as error:
            rows_of(model, tiny_family(), Job([[]], [4]), window=4)
        assert error.value.code == "window_of_full_sequence"


def one_layer():
    model = tiny_model()
    del model.blocks[1]
    model.config.num_hidden_layers = 1
    return model


def test_a_full_sequence_model_is_refused_a_cache(model):
    with pytest.raises(ConfigError) as error:
        rows_of(model, tiny_family(), Job([[]], [4]), cache=True)
    assert error.value.code == "cache_not_exact"


def test_a_cache_refuses_layouts_whose_past_depends_on_the_future(model):
    cache = model.new_cache(1, 8)
    for kind in ("full", "block_diffusion"):
        layout = Layout(kind, 4 if kind.startswith("block") else None)
        with pytest.raises(ValueError, match="causal"):
            cache.exact_slice(layout, torch.tensor([0]), 4, None, None)


class TestStride:
    def test_rows_up_to_the_context_are_one_canvas(self, model):
        family, job = tiny_family(), Job([[CLEAN[1]], []], [CONTEXT - 1, 5], seed=3)
        assert rows_of(model, family, job, stride=3) == rows_of(model, family, job)

    @pytest.mark.parametrize("stride", [None, 1, 5, CONTEXT])
    def test_longer_rows_go_on_from_what_is_finished(self, model, stride):
        family = tiny_family()
        job = Job([[CLEAN[1]] * 3, [CLEAN[2]] * (CONTEXT + 7), []], [30, 6, 9], seed=3)
        final = before = None
        for step in generate(
            model, family, job, rule="ancestral", steps=3, controls=FREE, stride=stride
        ):
            if final is not None:  # finished tokens never change
                for row, length in enumerate(step.final.tolist()):
                    assert torch.equal(step.canvas[row, :length], before[row, :length])
            final, before = step.final, step.canvas
        for row, (prompt, length) in enumerate(zip(job.prompts, job.lengths.tolist(), strict=True)):
            assert before[row, : len(prompt)].tolist() == prompt
            assert MASK not in before[row, :length].tolist()
        alone = Job([job.prompts[1]], [6], first_row=1, seed=3)
        assert rows_of(model, family, alone, stride=stride)[0] == before[1, : CONTEXT + 13].tolist()

    @pytest.mark.parametrize("stride", [0, CONTEXT + 1])
    def test_out_of_range_is_refused(self, model, stride):
        with pytest.raises(ConfigError) as error:
            rows_of(model, tiny_family(), Job([[]], [4]), stride=stride)
        assert error.value.code in ("stride_out_of_range", "greater_than_equal")

    def test_means_nothing_to_a_model_in_blocks(self, model):
        with pytest.raises(ConfigError) as error:
            rows_of(model, tiny_family(4), Job([[]], [4]), stride=4)
        assert error.value.code == "stride_in_blocks"
