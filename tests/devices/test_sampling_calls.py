"""Generation on a device that computes by itself: what the CPU waits for, and equal texts."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from pretend import moved, pretending
from recording import recordable
from refusals import refused
from test_rules import FAMILIES
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError
from textdiff.sampling import parts as parts_module
from textdiff.sampling import segment as segment_module
from textdiff.sampling.constraints.pattern import build_pattern
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.predictor import Predictor
from textdiff.sampling.request import Request
from textdiff.sampling.rules import RULES, remask
from textdiff.sampling.settings import SamplingConfig
from textdiff.sampling.teacher_forcing import ForcedEngine

JOB = Job([[CLEAN[0]], [], [CLEAN[1], None, CLEAN[2]]], [5, 6, 3])
# Texts that end at a token, and leave at other times than those beside them.
ENDING = Job(
    [[], [CLEAN[1]], [], [CLEAN[2]] * 5, []],
    [9, 7, 8, 4, 9],
    ended=lambda ids, new: CLEAN[0] in ids,
)
SEGMENTS = {None: 1, 4: 2}
CALL = 100  # launches of a network call, at least
# One of each process, and the objectives whose predictions go other ways.
CASES = ("mdlm", "sedd", "d3pm-plugged", "learned", "udlm", "sedd-uniform", "gidd")


SHIFTED = {"shifted": ("absorbing", {"kind": "mdlm", "shift": True})}


def spec_of(case: str, block_size: int | None) -> dict:
    process, objective = (FAMILIES | SHIFTED)[case]
    kind = {"gidd": "hybrid", "learned": "learned"}.get(case, "loglinear")
    return {
        "process": process,
        "schedule": {"kind": kind} | ({"exponent": 1.5} if kind == "learned" else {}),
        "objective": objective,
        "block_size": block_size,
        "timesteps": 5 if "d3pm" in case else None,
        "prompt_dropout": 0.1,  # so that guidance is defined where noise has no mask
    }


def family(case: str, block_size: int | None, device=None, exponents=None):
    vocabulary = Vocabulary.of(ROWS, MASK, EXCLUDED)
    return build_family(spec_of(case, block_size), vocabulary, device, exponents)


CALLS = [
    (case, rule, size)
    for case in CASES
    for rule in RULES
    for size in SEGMENTS
    if RULES[rule].refusal(family(case, size)) is None
]


def check_calls(
    case: str, rule: str, size: int | None, network=None, forced=None, recorded=None, **options
):
    """Compare a text with that of the CPU; return waits beside those of segments, and calls.

    `recorded` takes what the device has recorded; None: it cannot.
    """
    network = {"adaln": True, "time_conditioning": True} | (network or {})
    model = tiny_model(**network, diffusion=spec_of(case, size)).requires_grad_(False)
    parts, limits = options.pop("parts", ()), options.pop("limits", {})
    constraint, job = options.pop("constraint", lambda device: None), options.pop("job", JOB)

    def engine(device=None) -> Engine:
        config = SamplingConfig(rule=rule, **{"steps": 3} | options)
        request = Request(job, config, constraint=constraint(device))
        made = family(case, size, device, model.exponents)
        if forced is not None:
            return ForcedEngine(model, made, request, forced)
        engine = Engine(model, made, request, None if job is JOB else 3, parts)
        engine.controls = replace(engine.controls, **limits)
        return engine

    def text(engine: Engine):
        if forced is not None:
            return engine.log_likelihoods(), 0, []
        *_, last = steps = list(engine.run())
        return last.draft if "draft" in parts else last.canvas, last.calls, steps

    expected, _, steps = text(engine())
    with pretending() as watch, nullcontext() if recorded is None else recordable(watch):
        moved(model, watch)
        there = engine(watch.device)
        watch.uploads.clear(), watch.waits.clear()
        found, calls, lazy = text(there)
        segments = len({(*step.final.tolist(), *step.ends.tolist()) for step in steps})
        waits = len(watch.waits) - (segments or SEGMENTS[size])  # each is checked once
        if watch.readbacks:  # a network call was queued before the CPU waited for the last one
            assert min(watch.readbacks) >= CALL
        torch.testing.assert_close(found.held, expected, rtol=1e-12, atol=1e-12)
        for step, known in zip(lazy, steps, strict=True):
            assert torch.equal(step.changed, known.changed)
            torch.testing.assert_close(step.entropy, known.entropy, equal_nan=True)
    assert watch.uploads == []
    if recorded is not None:
        recorded += watch.graphs
    return waits, calls


@pytest.mark.parametrize(("case", "rule", "size"), CALLS)
def test_no_call_waits(case, rule, size):
    assert check_calls(case, rule, size)[0] <= 0


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize("case", ["mdlm", "udlm", "gidd", "sedd"])
def test_guidance_and_self_conditioning_add_no_waits(case, size):
    own = {"self_conditioning": True}
    waits, _ = check_calls(case, "ancestral", size, network=own, guidance=0.5)
    assert waits <= 0


ORDERS = (
    {"order": "entropy", "pace": "noise"},
    {"order": "margin", "order_temperature": 0.5},
    {"order": "position"},
)


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize("knobs", ORDERS)
def test_the_choice_of_the_network_stays_on_its_device(knobs, size):
    waits, _ = check_calls("mdlm", "confidence", size, knobs=knobs, guidance=0.5)
    assert waits <= 0


@pytest.mark.parametrize("rule", ["ancestral", "confidence"])
def test_an_approximate_cache_adds_no_waits(rule):
    assert check_calls("mdlm", rule, None, cache="approximate")[0] <= 0


STABLE = {"stable_calls": 1, "stable_entropy": 9.0}
OWN = {"network": {"self_conditioning": True}}
OPTIONS = [
    ("shifted", "confidence", {}),
    ("shifted", "confidence", OWN),
    ("mdlm", "first_hitting", OWN),
    ("mdlm", "remask", OWN),
    ("mdlm", "threshold", OWN),
    ("sedd", "euler", OWN),
    ("udlm", "threshold", OWN | {"knobs": STABLE}),
    ("mdlm", "confidence", {"repetition_penalty": 1.2, "temperature": (1.0, 0.5)}),
    ("mdlm", "threshold", {"repetition_penalty": 1.2, "temperature": (1.0, 0.5)}),
    ("mdlm", "threshold", {"knobs": {"factor": 1.5}, "limits": {"banned": (CLEAN[2],)}}),
    ("mdlm", "entropy_bound", {"guidance": 0.5}),
    ("d3pm-plugged", "ancestral", {"knobs": {"greedy_tail": True}}),
    ("udlm", "threshold", {"knobs": STABLE}),
    ("udlm", "gibbs", {"knobs": STABLE}),
    ("udlm", "ancestral", {"knobs": STABLE}),
    ("gidd", "predictor_corrector", {"knobs": {"corrections": 3}}),
    ("gidd", "predictor_corrector", {"knobs": {"corrections": 3, "patience": 1} | STABLE}),
]


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize(("case", "rule", "options"), OPTIONS)
def test_no_option_makes_a_call_wait(case, rule, options, size):
    assert check_calls(case, rule, size, **options)[0] <= 0


CONFIDENT = {"knobs": {"remasking": "conf"}}
REMASKING = [{}, OWN, {"guidance": 0.5}, OWN | {"guidance": 0.5}]


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize("own", REMASKING)
@pytest.mark.parametrize("steps", [3, 20])
def test_remasking_by_confidence_adds_no_waits(own, size, steps):
    assert check_calls("mdlm", "remask", size, steps=steps, **CONFIDENT, **own)[0] <= 0


def told(step):
    return step.calls, step.rows, step.changed.tolist(), step.remasked.tolist()


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize(
    ("own", "cache"), zip(REMASKING, ("off", "approximate", "approximate", "off"), strict=True)
)
def test_calls_for_what_may_be_masked_change_neither_texts_nor_counts(
    own, cache, loose, monkeypatch
):
    """A row of few tokens has turns without a call, and then the CPU has not read its masks."""
    if loose:  # all revealed tokens may be masked again, as far as the CPU can tell
        monkeypatch.setattr(remask, "largest_share", lambda revealed: torch.inf)
    network = {"adaln": True, "time_conditioning": True} | own.get("network", {})
    guidance = own.get("guidance", 0.0)
    config = SamplingConfig(rule="remask", steps=32, guidance=guidance, cache=cache, **CONFIDENT)
    left_out: list[int] = []
    discount = Predictor.discount

    def counted(predictor, needed):
        left_out.append(sum(int((~needed[rows]).sum()) for rows in predictor.last))
        discount(predictor, needed)

    monkeypatch.setattr(Predictor, "discount", counted)
    for seed, count in ((2, 1), (3, 1), (14, 1), (4, 2)):
        model = tiny_model(**network, diffusion=spec_of("mdlm", None)).requires_grad_(False)
        if model.self_conditioning is not None:
            model.self_conditioning.mlp[-1].weight.mul_(20.0)  # texts show what is read of it
        request = Request(Job([[]] * count, [9] * count, seed=seed), config)
        steps = list(Engine(model, family("mdlm", None), request).run())
        with pretending() as watch:
            moved(model, watch)
            there = Engine(model, family("mdlm", None, watch.device), request)
            watch.waits.clear()
            lazy = list(there.run())
            assert len(watch.waits) == 1
            for step, known in zip(lazy, steps, strict=True):
                assert told(step) == told(known)
                assert torch.equal(step.canvas.held, known.canvas)
    assert sum(left_out) > 0
    assert 0 in left_out


@pytest.mark.parametrize("size", SEGMENTS)
@pytest.mark.parametrize(
    ("case", "rule"), [("mdlm", "threshold"), ("mdlm", "ancestral"), ("udlm", "threshold")]
)
def test_texts_that_end_leave_without_further_waits(case, rule, size):
    knobs = {"threshold": 0.1} if rule == "threshold" else {}
    assert check_calls(case, rule, size, job=ENDING, knobs=knobs)[0] <= 0


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize(
    ("case", "rule", "knobs"),
    [
        ("mdlm", "threshold", {"threshold": 0.1}),
        ("sedd", "euler", {}),
        ("udlm", "threshold", STABLE),
        ("udlm", "gibbs", STABLE),
        ("gidd", "predictor_corrector", {"corrections": 9, "patience": 1}),
    ],
)
def test_a_segment_has_one_call_too_many_at_most_and_none_if_the_device_is_idle(
    case, rule, knobs, idle
):
    model = tiny_model(adaln=True, time_conditioning=True, diffusion=spec_of(case, 4))
    model.requires_grad_(False)
    request = Request(JOB, SamplingConfig(rule=rule, steps=9, knobs=knobs))
    engine = Engine(model, family(case, 4), request)
    texts = [step.canvas for step in engine.run()]
    with pretending() as watch:
        watch.idle = idle
        moved(model, watch)
        there = Engine(model, family(case, 4, watch.device), request)
        steps = list(there.run())
        assert [step.canvas.held.tolist() for step in steps] == [t.tolist() for t in texts]
    assert steps[-1].calls == engine.predictor.calls
    assert 0 <= there.predictor.calls - engine.predictor.calls <= (0 if idle else SEGMENTS[4])


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_calls_after_the_end_of_a_row_leave_its_earlier_predictions_alone(seed):
    """Rows that were stable are corrected later, and read then what their last call predicted."""
    model = tiny_model(norm="rmsnorm", self_conditioning=True, diffusion=spec_of("gidd", 8))
    model.requires_grad_(False)
    knobs = STABLE | {"redraws": 3, "corrections": 4, "patience": 2}
    request = Request(
        Job([[]] * 3, [15] * 3, seed=seed),
        SamplingConfig(rule="predictor_corrector", steps=9, knobs=knobs),
    )
    texts = [step.canvas.tolist() for step in Engine(model, family("gidd", 8), request).run()]
    with pretending() as watch:
        moved(model, watch)
        steps = Engine(model, family("gidd", 8, watch.device), request).run()
        assert [step.canvas.held.tolist() for step in steps] == texts


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_network_without_numbers_is_refused_at_the_end_of_a_segment(guidance):
    model = tiny_model(diffusion=spec_of("mdlm", 4)).requires_grad_(False)
    model.blocks[0].mlp[0].weight.fill_(torch.nan)
    request = Request(JOB, SamplingConfig(rule="confidence", steps=3, guidance=guidance))
    with pretending() as watch:
        moved(model, watch)
        engine = Engine(model, family("mdlm", 4, watch.device), request)
        with refused(CheckpointError, "output_not_finite", "NaN"):
            list(engine.run())


def pattern(device):
    """Texts of a few letters without two of them in a row; the last token ends a text."""
    tokens = [bytes([97 + token]) if token in CLEAN[:-1] else None for token in range(ROWS)]
    return build_pattern("[a-z]*", ["bc"], tokens, CLEAN[-1], 2, device, forced=["d"])


@pytest.mark.parametrize("size", SEGMENTS)
def test_constraints_and_bans_add_no_waits(size):
    limits = {"banned": (CLEAN[2],), "end_tokens": (CLEAN[-1],)}
    options = {"constraint": pattern, "limits": limits, "min_new_tokens": 2}
    assert check_calls("mdlm", "ancestral", size, **options)[0] <= 0


@pytest.mark.parametrize("size", SEGMENTS)
def test_drafts_add_no_waits_and_other_numbers_one_a_call(size):
    assert check_calls("mdlm", "remask", size, parts=("draft",))[0] <= 0
    parts = ("draft", "confidence", "entropy")
    waits, calls = check_calls("mdlm", "ancestral", size, parts=parts)
    assert waits <= calls


@pytest.mark.parametrize("size", SEGMENTS)
def test_teacher_forcing_adds_no_waits(size):
    texts = torch.tensor([[CLEAN[place % 5] for place in range(6)]] * 3)
    texts[2, :3] = torch.tensor([CLEAN[1], CLEAN[4], CLEAN[2]])
    for order, most in (("position", 0), ("probability", 1)):  # that no place is written twice
        model = {"forced": texts, "cache": "off", "knobs": {"order": order}}
        waits, _ = check_calls("mdlm", "confidence", size, **model)
        assert waits <= most


@pytest.mark.parametrize(("case", "rule"), [("d3pm-uniform", "ancestral"), ("gidd", "gibbs")])
def test_noise_is_redrawn_some_positions_at_a_time(case, rule, monkeypatch):
    model = tiny_model(adaln=True, time_conditioning=True)
    request = Request(
        JOB, SamplingConfig(rule=rule, steps=4, guidance=0.5 if case == "gidd" else 0.0)
    )
    whole = [step.canvas for step in Engine(model, family(case, None), request).run()]
    sizes: list[int] = []
    weigh = segment_module.next_token_weights

    def counted(prediction, tokens, *rest):
        sizes.append(len(tokens))
        return weigh(prediction, tokens, *rest)

    monkeypatch.setattr(segment_module, "next_token_weights", counted)
    monkeypatch.setattr(parts_module, "WEIGHTS", 5 * ROWS)
    parts = [step.canvas for step in Engine(model, family(case, None), request).run()]
    assert max(sizes) == 5
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
