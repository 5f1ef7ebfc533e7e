"""Finite outputs of any size: never a mask, an excluded id or an undefined weight, in any rule."""

from dataclasses import replace
from types import SimpleNamespace

import mpmath
import pytest
import torch
from engines import generate
from test_rules import FAMILIES, FITS, KNOBS, family_of
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model

from textdiff.diffusion.family import build_family
from textdiff.diffusion.process import Vocabulary
from textdiff.errors import CheckpointError, TextDiffError
from textdiff.sampling.constraints.pattern import build_pattern
from textdiff.sampling.context import Context
from textdiff.sampling.controls import Controls
from textdiff.sampling.draws import draw_tokens, inverse_cdf
from textdiff.sampling.guidance import mix
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.rules import RULES
from textdiff.sampling.rules.redrawing import grid

A, B = CLEAN[1], CLEAN[3]
PROMPTS = [[A, None, B, None, None, A], [], [A] * 5]
NEW = [3, 9, 4]
WALKS = [
    (case, name, knobs)
    for case, names in FITS.items()
    for name in sorted(names)
    for knobs in [{}, *KNOBS.get(name, [])[:1]]
]
LARGEST = float(torch.finfo(torch.float32).max)


def shouting():
    """A network with outputs up to +-800, +-1e4 and the largest float32, of several shapes."""
    model = tiny_model(adaln=True, time_conditioning=True).to(torch.float32)
    sizes = torch.tensor([800.0, 1e4, LARGEST])

    def louder(module, inputs, logits):
        row = torch.arange(len(logits)) + int(logits.abs().sum() * 1e3)  # another mix in every call
        size = sizes[row % 3][:, None]
        one = torch.full_like(logits, -1.0)
        one[:, CLEAN[-1]] = 1.0
        shapes = torch.stack([logits.sign(), logits.tanh(), one, torch.ones_like(logits)])
        return shapes[row // 3 % 4, torch.arange(len(logits))] * size

    model.output_layer.register_forward_hook(louder)
    return model


def check(model, case: str, rule: str, knobs: dict, size: int | None = None, **options) -> None:
    family = replace(family_of(case), block_size=size, hides_prompts=True)
    controls = options.pop("controls", Controls())
    job = Job(PROMPTS, NEW, seed=5)
    for step in generate(
        model, family, job, rule=rule, steps=4, knobs=knobs, controls=controls, **options
    ):
        assert not torch.isin(step.canvas, torch.tensor(EXCLUDED)).any()
    allowed = torch.tensor(CLEAN)
    for row, prompt, length in zip(step.canvas, PROMPTS, job.lengths.tolist(), strict=True):
        assert torch.isin(row[:length], allowed).all()
        for token, now in zip(prompt, row.tolist(), strict=False):
            assert token in (None, now)
    if not family.process.has_mask:
        assert not (step.canvas == MASK).any()


@pytest.mark.parametrize(
    ("case", "name", "knobs"), WALKS, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(WALKS)]
)
def test_every_rule_draws_clean_tokens(case, name, knobs):
    check(shouting(), case, name, knobs)


VARIANTS = {
    "cold": {"controls": Controls(temperature=1e-3)},
    "coldest": {"controls": Controls(temperature=1e-300)},
    "greedy": {"controls": Controls(temperature=0.0)},
    "falling": {"controls": Controls(temperature=(1.0, 0.0))},
    "nucleus": {"controls": Controls(top_p=0.5)},
    "least": {"controls": Controls(min_p=0.3)},
    "few": {"controls": Controls(top_k=2)},
    "penalty": {"controls": Controls(repetition_penalty=1.8)},
    "penalties": {"controls": Controls(repetition_penalty=1e300)},
    "ban": {"controls": Controls(banned=(CLEAN[-1],))},
    "guided": {"guidance": 3.0},
    "much guided": {"guidance": 1e300},
    "unguided": {"guidance": -1.0},
    "blocks": {"size": 4},
    "cached": {"size": 4, "cache": True},
    "guided blocks": {"size": 4, "guidance": 3.0},
}


SLOW_TO_DIFFER = {"first_hitting", "threshold", "entropy_bound"}  # rules that share all their draws


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", FITS)
def test_whatever_is_done_to_the_distribution(case, variant):
    model = shouting()
    for name in sorted(FITS[case] - SLOW_TO_DIFFER):
        check(model, case, name, {}, **VARIANTS[variant])


@pytest.mark.parametrize("case", FITS)
@pytest.mark.parametrize("value", [1e39, -1e39])
def test_infinite_outputs_of_a_narrow_dtype_are_refused(case, value):
    for dtype, what in ((torch.float16, "float16 overflows"), (torch.bfloat16, "checkpoint$")):
        model = tiny_model(adaln=True, time_conditioning=True)

        def overflow(module, inputs, logits, dtype=dtype):
            logits[:, CLEAN[2]] = value
            return logits.to(dtype)

        model.output_layer.register_forward_hook(overflow)
        with pytest.raises(CheckpointError, match=what) as error:
            check(model, case, "ancestral", {})
        assert error.value.code == "output_not_finite"


def test_a_network_may_rule_tokens_out():
    """Minus infinity in full precision is probability 0; it cannot be so of all tokens."""
    for tokens in (CLEAN[:3], CLEAN):
        model = tiny_model(adaln=True, time_conditioning=True)

        def without(module, inputs, logits, tokens=tokens):
            logits[:, list(tokens)] = -torch.inf
            return logits

        model.output_layer.register_forward_hook(without)
        job = Job([[]] * 9, [9] * 9)
        walk = generate(
            model, family_of("mdlm"), job, rule="ancestral", steps=3, controls=Controls()
        )
        if tokens == CLEAN:
            with pytest.raises(CheckpointError) as error:
                list(walk)
            assert error.value.code == "output_not_finite"
        else:
            *_, last = walk
            assert set(last.canvas.flatten().tolist()) <= set(CLEAN[3:])


def test_only_outputs_that_are_read_have_to_be_finite():
    model = tiny_model(adaln=True, time_conditioning=True)
    with torch.no_grad():
        model.output_layer.linear.weight[[MASK, *EXCLUDED]] = torch.nan
    for case in FITS:
        if case == "d3pm-plugged":  # which reads the mask's
            with pytest.raises(CheckpointError) as error:
                check(model, case, "ancestral", {})
            assert error.value.code == "output_not_finite"
        else:
            check(model, case, "ancestral", {})


# --- one draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "tweedie"])
@pytest.mark.parametrize("top", [0.0, 80.0, 700.0, 800.0, 1e4, 3e38])
def test_the_next_token_follows_scores_of_any_size(name, top):
    """Uniform noise, against numbers that do not overflow: what is drawn, not only that it is."""
    family = family_of("sedd-uniform")
    process, schedule = family.process, family.schedule
    clean, xt = list(CLEAN), CLEAN[0]
    raw = torch.full((1, len(process.vocabulary.clean)), -torch.inf, dtype=torch.float64)
    raw[0, clean] = torch.linspace(-3.0, 1.0, len(clean), dtype=torch.float64)
    raw[0, clean[2]], raw[0, clean[3]], raw[0, xt] = top, top - 1.0, 0.0
    interval = grid(schedule, 8)[3]
    segment = SimpleNamespace(process=process, schedule=schedule)
    weights = RULES[name]().move(segment, raw, torch.tensor([xt]), interval)
    drawn = weights.clamp(min=0.0)[0]

    with mpmath.workdps(60):
        scores = [mpmath.exp(mpmath.mpf(float(raw[0, y]))) for y in clean]
        alpha_s, alpha_t = (mpmath.mpf(float(a)) for a in (interval.alpha_s, interval.alpha_t))
        ratio, count = alpha_t / alpha_s, len(clean)
        if name == "tweedie":
            arrived = (1 - ratio) / count
            total = sum(scores) * arrived
            back = [(s - total) / ratio for s in scores]
            weights = [
                b * (arrived + (ratio if y == xt else 0)) for b, y in zip(back, clean, strict=True)
            ]
        else:
            rate = mpmath.mpf(float(-schedule.dalpha(interval.t) / interval.alpha_t / 8))
            weights = [rate * s / count for s in scores]
            weights[0] = 1 - sum(weights[1:])
        weights = [max(w, mpmath.mpf(0)) for w in weights]
        expected = [float(w / sum(weights)) for w in weights]
    assert drawn.isfinite().all()
    assert (drawn / drawn.sum())[clean].tolist() == pytest.approx(expected, abs=1e-9)
    assert drawn[[MASK, *EXCLUDED]].tolist() == [0.0] * (1 + len(EXCLUDED))


def test_nothing_without_weight_is_drawn():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2000, 40, generator=generator, dtype=torch.float64) ** 60
    weights[torch.rand(2000, 40, generator=generator) < 0.7] = 0.0
    weights[:, -3:] = 0.0
    weights[:, 5] += 5e-324
    weights[:200] *= 1e300
    ends = torch.tensor([5e-324, 2.0**-53, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    u = torch.rand(2000, generator=generator, dtype=torch.float64)
    for numbers in (u, *(end.expand(2000) for end in ends)):
        column = inverse_cdf(weights, numbers)
        assert (weights.gather(1, column[:, None]) > 0.0).all()


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_weights_that_nothing_can_be_drawn_from_are_refused(value):
    weights = torch.ones(2, 4, dtype=torch.float64)
    weights[1] = value
    with pytest.raises(TextDiffError) as error:
        inverse_cdf(weights, torch.full((2,), 0.5, dtype=torch.float64))
    assert error.value.code == "no_token_to_draw"


def test_guidance_of_any_weight_takes_the_token_that_it_should():
    """In logs, at 60 digits: products of weights and log-probabilities that overflow float32."""
    conditional = torch.tensor([[-3e38, -0.5, -0.93], [-1e38, 0.0, -2e38]])
    unconditional = torch.tensor([[0.0, -1e5, -3e38], [-3e38, -3e38, 0.0]])
    for weight in (0.5, 4.0, 1e30, 1e300):
        found = mix(conditional, unconditional, weight).double().exp()
        for row in range(2):
            exact = [
                mpmath.mpf(b) + (1 + mpmath.mpf(weight)) * (mpmath.mpf(t) - mpmath.mpf(b))
                for t, b in zip(conditional[row].tolist(), unconditional[row].tolist(), strict=True)
            ]
            expected = [float(mpmath.exp(e - max(exact))) for e in exact]
            total = sum(expected)
            assert found[row].tolist() == pytest.approx([e / total for e in expected], abs=1e-6)


def test_small_log_weights_of_a_hook_stay_apart_under_a_constraint():
    """What a constraint may ask for has a trace, beside the row's largest and not in its place."""
    vocabulary = Vocabulary.of(5, 4)
    pattern = build_pattern(".", [], [b"a", b"b", b"c", b"d", None], None)
    log_x0 = torch.tensor([[-0.1, -3.0, -3.0, -3.0, -torch.inf]], dtype=torch.float64).expand(99, 5)
    canvas, u = torch.full((99, 1), 4), (torch.arange(99).double() + 0.5) / 99
    at, t = Positions.of(torch.arange(99), canvas), torch.ones(99, dtype=torch.float64)
    controls = Controls(constraint=pattern, hooks=(lambda context, x: x * 10.0 - 3e4,))
    drawn = draw_tokens(log_x0, u, controls, Context(canvas, at, t, vocabulary))
    assert set(drawn.tolist()) == {0}


SCHEDULES = [
    {"kind": "geometric", "sigma_max": 800.0},  # alpha underflows to 0
    {"kind": "geometric", "sigma_max": 36.0},  # alpha is lost beside 1
    {"kind": "loglinear", "eps": 1e-300},
    {"kind": "polynomial", "exponent": 2000.0},  # alpha rounds to 1 half-way
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: str(list(s.values())))
@pytest.mark.parametrize("case", ["mdlm", "sedd", "udlm", "sedd-uniform", "d3pm-uniform"])
def test_schedules_of_extreme_ends_leave_something_to_draw(case, schedule, monkeypatch):
    process, objective = FAMILIES[case]
    spec = {"process": process, "schedule": schedule, "objective": objective, "block_size": None}
    family = build_family({**spec, "timesteps": 5}, Vocabulary.of(ROWS, MASK, EXCLUDED))
    monkeypatch.setattr("test_extreme_outputs.family_of", lambda case: family)
    for model in (shouting(), tiny_model(adaln=True, time_conditioning=True)):
        for name in sorted(FITS[case] - SLOW_TO_DIFFER):
            check(model, case, name, {})


def test_an_order_at_next_to_no_temperature_reveals_every_mask():
    for order in ("probability", "margin", "entropy"):
        knobs = {"order": order, "order_temperature": 1e-310}
        check(shouting(), "mdlm", "confidence", knobs)
