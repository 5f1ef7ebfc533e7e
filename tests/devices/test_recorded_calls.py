"""Calls of the network that a GPU replays: equal texts, few launches, and memory that stays."""

import inspect
import logging
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from gpu_checks.replays import recorded_texts
from pretend import moved, pretending
from recording import Graph, capturing, recordable
from test_rules import FAMILIES
from test_sampling_calls import (
    CASES,
    ENDING,
    JOB,
    OWN,
    SEGMENTS,
    STABLE,
    check_calls,
    family,
    spec_of,
)
from tiny_models import CLEAN, CONTEXT, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.models import CAUSAL, FULL, Layout, graphs
from textdiff.models.cache import LEAST_READ
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import Predictor
from textdiff.sampling.request import Request
from textdiff.sampling.rules import RULES
from textdiff.sampling.settings import SamplingConfig
from textdiff.sampling.teacher_forcing import policy_log_likelihood

PROMPTS = [[], [CLEAN[3]] * 9, [CLEAN[1], CLEAN[2]], [CLEAN[5]] * 4, [CLEAN[0]] * 5]
RAGGED = Job(PROMPTS, [13, 6, 1, 4, 11], seed=5)


def check(case: str, rule: str, size: int | None, **options) -> list[Graph]:
    """Compare recorded calls with those of the CPU; return what was recorded."""
    recorded: list[Graph] = []
    waits, _ = check_calls(case, rule, size, recorded=recorded, **options)
    assert waits <= 0
    assert all(graph.replays for graph in recorded)
    return recorded


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_writes_the_same_by_recorded_calls(rule, size):
    case = next(c for c in (*CASES, *FAMILIES) if not RULES[rule].refusal(family(c, size)))
    assert check(case, rule, size, job=RAGGED)


@pytest.mark.parametrize(
    ("size", "cache"), [(None, "off"), (None, "approximate"), (4, "on"), (4, "off")]
)
@pytest.mark.parametrize("case", ["mdlm", "udlm", "gidd"])
def test_every_cache_is_read_and_written_by_recorded_calls(case, size, cache):
    check(case, "ancestral", size, job=ENDING, cache=cache)
    assert check(case, "ancestral", size, job=RAGGED, cache=cache)


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize(
    ("case", "rule", "options"),
    [
        ("shifted", "confidence", {}),
        ("mdlm", "confidence", OWN),
        ("udlm", "threshold", OWN | {"knobs": STABLE}),
        ("mdlm", "entropy_bound", {"guidance": 0.5}),
        ("mdlm", "ancestral", {"network": {"adaln": False, "time_conditioning": False}}),
        ("mdlm", "ancestral", {"network": {"qk_norm": True, "mlp": "swiglu"}}),
    ],
)
def test_every_network_is_recorded(case, rule, options, size):
    assert check(case, rule, size, job=RAGGED, **options)


@contextmanager
def device(model, recorded: bool = True):
    """A network on the pretend device, with a watch over it."""
    with pretending() as watch:
        moved(model, watch)
        if not recorded:
            yield watch
            return
        with recordable(watch):
            yield watch


def tiny(case: str, size: int | None, **network):
    network = {"adaln": True, "time_conditioning": True, "diffusion": spec_of(case, size)} | network
    return tiny_model(**network).requires_grad_(False)


def texts(model, made, job=RAGGED, **options) -> list[list[int]]:
    *_, last = Engine(model, made, Request(job, SamplingConfig(**options))).run()
    rows = last.canvas.cpu() if last.canvas.device.type == "cpu" else last.canvas.held
    return rows.tolist()


@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("adapted", [{}, {"ar_weight": 0.5}, {"shift": True, "ar_weight": 0.5}])
def test_windows_and_causal_contexts_are_recorded(adapted, window):
    model, options = tiny_model().requires_grad_(False), {"steps": 5, "window": window}

    def made(device=None):
        spec = spec_of("mdlm", 4) | {"objective": {"kind": "mdlm"} | adapted}
        return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED), device)

    expected = texts(model, made(), **options)
    with device(model) as watch:
        assert texts(model, made(watch.device), **options) == expected
        assert watch.graphs


def launches(layers: int, recorded: bool) -> tuple[int, int]:
    """Launches of a text's calls, and of its tenth call alone."""
    model = tiny("mdlm", 4, num_hidden_layers=layers)
    job = Job([[]] * 3, [12] * 3)
    request = Request(job, SamplingConfig(rule="confidence", steps=4))
    with device(model, recorded) as watch:
        engine, marks = Engine(model, family("mdlm", 4, watch.device), request), []
        watch.launches.clear()
        for _ in engine.run():
            marks.append(len(watch.launches))
    return marks[-1], marks[9] - marks[8]


def test_a_recorded_call_has_as_many_launches_however_deep_the_network_is():
    shallow, deep = launches(2, True), launches(6, True)
    plain, plain_deep = launches(2, False), launches(6, False)
    assert shallow[1] == deep[1] < plain[1] - 50
    assert plain_deep[1] - plain[1] > 4 * 30
    assert deep[0] < plain_deep[0] / 2


def test_few_numbers_of_rows_are_recorded():
    model, job = tiny("mdlm", 4), Job([[]] * 7, [24] * 7)
    options = {"rule": "ancestral", "steps": 8}  # in most of them a row has nothing to change
    made = Engine(model, family("mdlm", 4), Request(job, SamplingConfig(**options)))
    expected = list(made.run())
    called = {new.rows - old.rows for old, new in pairwise(expected)}
    with device(model) as watch:
        engine = Engine(
            model, family("mdlm", 4, watch.device), Request(job, SamplingConfig(**options))
        )
        steps = list(engine.run())
        numbers = {shape[0][0] for shape in engine.predictor._recorded._calls}
    assert [step.canvas.held.tolist() for step in steps] == [s.canvas.tolist() for s in expected]
    assert [step.rows for step in steps] == [step.rows for step in expected]
    assert len(called) >= 5
    assert numbers <= {1, 2, 4, 7}
    assert len(watch.graphs) <= 2 * len(numbers)


@pytest.mark.parametrize("most", [1, 2])
def test_few_recorded_calls_are_kept(most, monkeypatch):
    model, options = tiny("udlm", 4), {"steps": 6, "cache": "off"}
    expected = texts(model, family("udlm", 4), **options)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", most)
    with device(model) as watch:
        request = Request(RAGGED, SamplingConfig(**options))
        engine = Engine(model, family("udlm", 4, watch.device), request)
        *_, last = engine.run()
        assert last.canvas.held.tolist() == expected
        held = [call for call in engine.predictor._recorded._calls.values() if call is not None]
    assert len(held) <= most < len(watch.graphs)


def test_rows_are_not_joined_by_longer_ones_that_cannot_be_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 16)
    model, shapes = tiny("mdlm", None), []
    predicted = Predictor._logits

    def counted(self, tokens, *inputs, **options):
        shapes.append(tuple(tokens.shape))
        return predicted(self, tokens, *inputs, **options)

    monkeypatch.setattr(Predictor, "_logits", counted)
    job, found = Job([[CLEAN[0]] * 14, [], [], []], [2, 4, 4, 4], seed=3), []
    for recorded in (False, True):
        with device(model, recorded) as watch:
            texts(model, family("mdlm", None, watch.device), job, steps=40)
        found.append(shapes.copy())
        shapes.clear()
    assert (3, 4) in found[0]
    assert found[0] == found[1]


def test_rows_that_a_cache_approximates_are_not_joined_to_first_calls(monkeypatch):
    """Their stored keys and values would become another approximation."""
    joined, asked = Predictor._joined, []

    def watched(self, rows, lengths):
        asked.append(bool(self.stored[rows].all()))
        return joined(self, rows, lengths)

    monkeypatch.setattr(Predictor, "_joined", watched)
    model = tiny("mdlm", None)
    with device(model) as watch:
        texts(model, family("mdlm", None, watch.device), cache="approximate", steps=9)
    assert asked
    assert all(asked)


def test_rows_of_a_later_block_are_not_joined_by_those_of_the_first():
    lengths = [8] * 6 + [4] * 12  # the first ones are still active when the last ones come in
    job, model = Job([[]] * len(lengths), lengths), tiny("mdlm", 4)

    def written(device=None):
        request = Request(job, SamplingConfig(rule="ancestral", steps=8))
        *_, last = Engine(model, family("mdlm", 4, device), request, slots=12).run()
        return last.canvas

    expected = written().tolist()
    with device(model) as watch:
        assert written(watch.device).held.tolist() == expected


@torch.no_grad()
def test_outputs_are_read_before_a_call_of_another_shape_spoils_them():
    model, at = tiny("mdlm", None), torch.arange(3)
    with device(model) as watch:
        calls, put, first = graphs.RecordedCalls(model), watch.put, []
        for length in (5, 5, 6, 6, 5, 6):
            tokens = put(torch.zeros(1, length, dtype=torch.int64))
            first.append(calls(tokens, put(torch.ones(1, 1)), put(at), FULL).held)
        assert len(watch.graphs) == 2
    assert not torch.stack(first).isnan().any()
    assert first[0].equal(first[4])
    assert first[2].equal(first[5])


def test_larger_calls_are_not_recorded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_TOKENS", 4 * len(PROMPTS) - 1)
    model = tiny("mdlm", 4)
    expected = texts(model, family("mdlm", 4), steps=4)
    with device(model) as watch:
        assert texts(model, family("mdlm", 4, watch.device), steps=4) == expected
    assert watch.graphs  # those of fewer rows


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(monkeypatch, caplog):
    model = tiny("mdlm", 4)
    expected = texts(model, family("mdlm", 4), steps=4)
    rotary = type(model)._rotary

    def waiting(self, *inputs):
        self.vocab_embed.embedding.sum().item()  # as no recorded call may
        return rotary(self, *inputs)

    monkeypatch.setattr(type(model), "_rotary", waiting)
    with device(model) as watch, caplog.at_level(logging.WARNING):
        assert texts(model, family("mdlm", 4, watch.device), steps=4) == expected
    assert len(watch.graphs) == 1
    assert not watch.graphs[0].replays
    [said] = caplog.messages
    assert "could not record" in said
    assert "capturing" in said


def test_a_model_may_do_without():
    model = tiny("mdlm", 4)
    model.cuda_graphs = False
    with device(model) as watch:
        texts(model, family("mdlm", 4, watch.device), steps=4)
    assert watch.graphs == []


def test_gradients_are_not_recorded():
    model = tiny("mdlm", None).requires_grad_(True)
    wanted = torch.tensor([[CLEAN[place % 5] for place in range(6)]] * 2)
    config = SamplingConfig(rule="confidence", steps=6, knobs={"order": "position"})
    expected = policy_log_likelihood(model, family("mdlm", None), wanted, config)
    with device(model) as watch:
        made = family("mdlm", None, watch.device)
        found = policy_log_likelihood(model, made, wanted, config)
        torch.testing.assert_close(found.held, expected, rtol=1e-12, atol=1e-12)
    assert found.requires_grad
    assert watch.graphs == []


LAYOUTS = [CAUSAL, Layout("block_causal", 4), Layout("block_causal", 4, causal_context=True)]


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("slots", [None, torch.tensor([2, 0])])
@pytest.mark.parametrize("starts", [[4, 4], [4, 8]])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_places_of_a_fixed_shape_hold_and_show_the_same(layout, starts, slots, window):
    model, length = tiny_model().requires_grad_(False), 4
    ids = torch.randint(0, 4, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    starts = torch.tensor(starts)
    found = []
    for fixed in (False, True):
        cache = model.new_cache(3, 16 if window else 2 * LEAST_READ)
        for begins, tokens in ((0 * starts, ids[:, :4]), (0 * starts + 4, ids[:, 4:8])):
            view = cache.exact_slice(layout.after(begins + 4), begins, 4, slots, window)
            model(tokens, cache=view, layout=layout)
        view = cache.exact_slice(layout.after(starts), starts, length, slots, window)
        view = view.fixed(2) if fixed else view
        logits = model(ids[:, 8:12], cache=view, layout=layout).logits
        found.append((logits, cache.store, view))
    (logits, store, view), (same, stored, wider) = found
    torch.testing.assert_close(same, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stored, store, rtol=1e-12, atol=1e-12)
    assert wider.width == (16 if window else LEAST_READ) >= view.width


@torch.no_grad()
def test_documents_and_finished_tokens_are_those_of_the_call():
    model, generator = tiny("mdlm", 4), torch.Generator().manual_seed(0)
    layout = Layout("block_causal", 4, causal_context=True)
    inputs = [  # documents [2, 8], finished [2]
        (torch.zeros(2, 8, dtype=torch.int64), torch.tensor([4, 4])),
        (torch.tensor([[0] * 8, [0] * 6 + [-1] * 2]), torch.tensor([4, 4])),
        (torch.tensor([[0] * 8, [0] * 6 + [-1] * 2]), torch.tensor([4, 0])),
        (torch.tensor([[0] * 3 + [1] * 5, [0] * 8]), torch.tensor([0, 4])),
    ]
    tokens = torch.randint(0, 4, (2, 8), generator=generator)
    sigma, at = torch.rand(2, 1, generator=generator), [1, 9, 14]
    options = {"sigma": sigma, "positions": torch.tensor(at)}
    expected = [
        model(tokens, layout=layout.within(ids).after(done), **options).logits
        for ids, done in inputs
    ]
    assert not any(one.equal(other) for one, other in pairwise(expected))
    with device(model) as watch:
        calls, put = graphs.RecordedCalls(model), watch.put
        assert calls.serves(tokens.numel())
        for (ids, done), logits in zip(inputs, expected, strict=True):
            seen = layout.within(put(ids)).after(put(done))
            found = calls(put(tokens), put(sigma), put(torch.tensor(at)), seen)
            torch.testing.assert_close(found.held, logits, rtol=1e-12, atol=1e-12)
        assert [graph.replays for graph in watch.graphs] == [3]


def test_the_check_of_gpus_compares_recorded_calls_with_others():
    model = tiny("mdlm", 4)
    with device(model) as watch:
        made = family("mdlm", 4, watch.device)

        def generate(prompt, rule, cache, num_samples, max_new_tokens, steps, seed):
            job = Job([[]] * num_samples, [max_new_tokens // 4] * num_samples, seed=seed)
            return SimpleNamespace(texts=texts(model, made, job, rule=rule, cache=cache, steps=4))

        stage = recorded_texts(
            SimpleNamespace(model=model, generate=generate), "ancestral", "on", "x"
        )
        checks = list(stage)
    assert [check.found for check in checks] == [0.0] * 3
    assert checks[1].note == f"{len(watch.graphs)} shapes" != "0 shapes"
    assert model.cuda_graphs


def test_the_stand_ins_are_called_as_torchs_functions_are():
    real = list(inspect.signature(torch.cuda.graph).parameters.values())
    pretended = list(inspect.signature(capturing).parameters.values())
    names = [(parameter.name, parameter.default) for parameter in pretended]
    assert [(parameter.name, parameter.default) for parameter in real][: len(names)] == names
    used = ("current_stream", 1), ("stream", 1), ("synchronize", 1), ("graph_pool_handle", 0)
    for function, count in used:
        inspect.signature(getattr(torch.cuda, function)).bind(*[None] * count)
    assert callable(torch.cuda.CUDAGraph.replay)


def test_a_device_that_cannot_replay_has_no_recorded_calls():
    model = tiny("mdlm", None)
    request = Request(JOB, SamplingConfig(steps=2))
    assert Engine(model, family("mdlm", None), request).predictor._recorded is None
    cuda = torch.device("cuda")
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert not graphs.replays(cuda)
    with mock.patch("torch.cuda.is_available", return_value=True):
        assert graphs.replays(cuda)
        assert not graphs.replays(torch.device("mps"))
