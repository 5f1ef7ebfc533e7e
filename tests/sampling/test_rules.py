"""What every decoding rule owes its users, on networks in float64; and their names and knobs."""

import importlib.util
import re
import sys

import pytest
import torch
from children import finished
from engines import generate
from tiny_models import CLEAN, EXCLUDED, MASK, ROWS, tiny_model
from torch import Tensor

from textdiff.config import SampleConfig
from textdiff.diffusion.family import Family, build_family
from textdiff.diffusion.objectives import Prediction
from textdiff.diffusion.process import Vocabulary
from textdiff.diffusion.randomness import Stream, uniforms
from textdiff.errors import ConfigError
from textdiff.sampling.controls import Controls
from textdiff.sampling.job import Job
from textdiff.sampling.positions import Positions
from textdiff.sampling.previous import OpenPlaces
from textdiff.sampling.rules import RULES, build_rule, check_rule
from textdiff.sampling.segment import Segment
from textdiff.sampling.watch import PARTS, Watch

FAMILIES = {
    "mdlm": ("absorbing", {"kind": "mdlm"}),
    "sedd": ("absorbing", {"kind": "sedd"}),
    "d3pm": ("absorbing", {"kind": "d3pm"}),
    "d3pm-plugged": ("absorbing", {"kind": "d3pm", "parameterization": "plugged"}),
    "learned": ("absorbing", {"kind": "mdlm"}),
    "udlm": ("uniform", {"kind": "udlm"}),
    "sedd-uniform": ("uniform", {"kind": "sedd"}),
    "d3pm-uniform": ("uniform", {"kind": "d3pm"}),
    "gidd": ("hybrid", {"kind": "gidd"}),
}
ORDERED = {"confidence", "threshold", "entropy_bound"}
REVISING = {"ancestral", "predictor_corrector", "gibbs", "threshold", "entropy_bound"}
FITS = {
    "mdlm": {"ancestral", "first_hitting", "remask", *ORDERED},
    "sedd": {"ancestral", "first_hitting", "remask", "euler", "tweedie", *ORDERED},
    "d3pm": {"ancestral", "first_hitting", "remask", *ORDERED},
    "d3pm-plugged": {"ancestral", *ORDERED},
    "learned": {"ancestral"},
    "udlm": REVISING,
    "sedd-uniform": {"euler", "tweedie", *REVISING},
    "d3pm-uniform": REVISING,
    "gidd": REVISING,
}
KNOBS = {  # beside the defaults
    "ancestral": [{"greedy_tail": True}],
    "euler": [{"greedy_tail": True}],
    "confidence": [
        {"order": "margin", "pace": "noise"},
        {"order": "entropy", "order_temperature": 0.7},
    ],
    "threshold": [{"threshold": 0.4}, {"factor": 1.5}],
    "entropy_bound": [{"entropy_bound": 2.0}],
    "remask": [
        {"remasking": "rescale", "eta": 0.5},
        {"remasking": "conf"},
        {"remasking": "loop", "eta": 0.1},
        {"eta": 0.3},
    ],
    "predictor_corrector": [{"redraws": 3.0, "corrections": 4, "patience": 2}],
    "gibbs": [
        {"correctors": 2, "positions": 2, "choice": "random"},
        {"stable_calls": 1, "stable_entropy": 3.0},
    ],
}
WALKS = [
    (case, name, knobs)
    for case, names in FITS.items()
    for name in sorted(names)
    for knobs in [{}, *KNOBS.get(name, [])]
]
EVERY = pytest.mark.parametrize(
    ("case", "name", "knobs"), WALKS, ids=[f"{c}-{n}-{i}" for i, (c, n, _) in enumerate(WALKS)]
)
STEPS, WIDTH = 7, 9


def family_of(case: str) -> Family:
    process, objective = FAMILIES[case]
    kind = {"gidd": "hybrid", "learned": "learned"}.get(case, "loglinear")
    spec = {
        "process": process,
        "schedule": {"kind": kind},
        "objective": objective,
        "block_size": None,
        "timesteps": 5 if "d3pm" in case else None,
    }
    return build_family(spec, Vocabulary.of(ROWS, MASK, EXCLUDED))


@pytest.fixture(scope="module")
def model():
    return tiny_model(adaln=True, time_conditioning=True)


class Network:
    """A denoiser over the first columns of canvases, which notes what it was asked."""

    def __init__(self, model, family: Family):
        self.model, self.family = model, family
        self.asked: list[Tensor] = []

    def __call__(self, canvas: Tensor, t: Tensor, positions: Positions) -> Prediction:
        assert canvas.dtype == positions.flat.dtype == torch.int64
        assert t.shape == (len(canvas),)
        assert ((t >= 0.0) & (t <= 1.0)).all()
        self.asked.append(positions.flat)
        rows, where = torch.unique(positions.row, return_inverse=True)
        assert (positions.column < WIDTH).all()
        alpha = self.family.known_alpha(self.family.schedule.alpha(t[rows]))
        xs = canvas[rows][:, :WIDTH]
        at = where * WIDTH + positions.column
        sigma = -alpha.log().double().unsqueeze(1)
        with torch.no_grad():
            logits = self.model(xs, sigma=sigma, positions=at).logits
        return self.family.objective.predict(logits, xs.flatten()[at], alpha[where])


def holes(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[R, L] clean tokens, and which of them are given; the first row is all, the second none."""
    generator = torch.Generator().manual_seed(seed)
    frozen = torch.rand(rows, width, generator=generator) < 0.4
    frozen[0], frozen[1] = True, False
    text = torch.tensor(CLEAN)[torch.randint(len(CLEAN), (rows, width), generator=generator)]
    return text, frozen


def walk(model, case: str, name: str, knobs: dict, rows: Tensor, text, frozen, **rest):
    """Steps of some rows of a job, and what the network was asked."""
    family = family_of(case)
    network = Network(model, family)
    at = torch.arange(text.shape[1])

    def draws(stream: Stream, step: int) -> Tensor:
        return uniforms(1, stream, row=rows[:, None], step=step, position=at)

    noise = family.process.prior(tuple(text.shape), draws(Stream.PRIOR, 0))
    steps = list(
        build_rule(name, family, knobs)(
            Segment(
                network,
                family.process,
                family.schedule,
                torch.where(frozen, text, noise),
                **{
                    "steps": STEPS,
                    "frozen": frozen,
                    "uniforms": draws,
                    "controls": Controls(),
                    **rest,
                },
            )
        )
    )
    return steps, network.asked


@EVERY
def test_given_tokens_stay_noise_goes_and_steps_say_what_changed(model, case, name, knobs):
    text, frozen = holes(12, WIDTH)
    steps, asked = walk(model, case, name, knobs, torch.arange(12), text, frozen)
    assert len(steps) == len(asked)
    before = None
    for index, (step, positions) in enumerate(zip(steps, asked, strict=True)):
        assert torch.equal(step.canvas[frozen], text[frozen])
        assert not torch.isin(step.canvas, torch.tensor(EXCLUDED)).any()
        assert (step.index, step.calls) == (index, index + 1)
        assert not frozen.flatten()[positions].any()
        assert not frozen.flatten()[step.changed].any()
        if before is not None:
            moved = (step.canvas != before).flatten().nonzero().flatten()
            assert torch.isin(moved, step.changed).all()
        before = step.canvas.clone()
    assert torch.isin(steps[-1].canvas, torch.tensor(CLEAN)).all()
    limit = WIDTH if name == "first_hitting" else STEPS + knobs.get("corrections", 0)
    assert len(steps) <= limit


@EVERY
def test_a_row_is_the_same_alone_in_company_and_beside_padding(model, case, name, knobs):
    """A full row is in no call, and each row is in as many as it makes alone."""
    rows = 6
    text, frozen = holes(rows, WIDTH, seed=2)
    frozen[2, 1:], frozen[3, 2:] = True, True
    together, asked = walk(model, case, name, knobs, torch.arange(rows), text, frozen)
    calls = torch.zeros(rows, dtype=torch.int64)
    for positions in asked:
        calls[(positions // WIDTH).unique()] += 1
    for row in range(rows):
        one = slice(row, row + 1)
        wider = torch.nn.functional.pad(text[one], (0, row), value=MASK)
        closed = torch.nn.functional.pad(frozen[one], (0, row), value=True)
        alone, own = walk(model, case, name, knobs, torch.tensor([row]), wider, closed)
        assert len(own) == calls[row]
        last = alone[-1].canvas if alone else wider
        assert torch.equal(together[-1].canvas[one], last[:, :WIDTH])
        assert (last[:, WIDTH:] == MASK).all()
    assert calls[0] == 0
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    mixed, _ = walk(model, case, name, knobs, order, text[order], frozen[order])
    assert torch.equal(mixed[-1].canvas, together[-1].canvas[order])


@EVERY
def test_nothing_open_is_no_call(model, case, name, knobs):
    text, frozen = holes(3, WIDTH)
    steps, asked = walk(model, case, name, knobs, torch.arange(3), text, torch.ones_like(frozen))
    assert not steps
    assert not asked


@pytest.mark.parametrize("case", FITS)
def test_truncation_acts_in_every_rule(model, case):
    """With one token left to draw from, the likeliest, other uniforms change no token of it."""
    text, frozen = holes(6, WIDTH)
    for name in sorted(FITS[case] & {"first_hitting", "confidence", "threshold", "entropy_bound"}):
        runs = [
            walk(model, case, name, {}, torch.arange(6), text, frozen, controls=controls)[0]
            for controls in (Controls(temperature=0.0), Controls(top_k=1), Controls(top_p=1e-9))
        ]
        assert torch.equal(runs[0][-1].canvas, runs[1][-1].canvas)
        assert torch.equal(runs[0][-1].canvas, runs[2][-1].canvas)


@pytest.mark.parametrize("case", ["mdlm", "udlm", "sedd-uniform", "gidd"])
@pytest.mark.parametrize("name", ["ancestral", "euler", "tweedie", "predictor_corrector"])
def test_greedy_tail_changes_the_last_step_alone(model, case, name):
    if name not in FITS[case]:
        return
    text, frozen = holes(20, WIDTH)
    rows = torch.arange(20)
    free, _ = walk(model, case, name, {}, rows, text, frozen)
    tail, _ = walk(model, case, name, {"greedy_tail": True}, rows, text, frozen)
    for a, b in zip(free[:-1], tail[:-1], strict=True):
        same = (a.t > 1.0 / STEPS + 1e-9) if case == "mdlm" else a.t > -1.0
        assert torch.equal(a.canvas[same], b.canvas[same])
    assert not torch.equal(free[-1].canvas, tail[-1].canvas)


# --- watching -------------------------------------------------------------------------------------


@EVERY
def test_watching_changes_no_token_and_fills_what_was_asked(model, case, name, knobs):
    text, frozen = holes(6, WIDTH)
    family = family_of(case)
    rows, at = torch.arange(6), torch.arange(WIDTH)

    def draws(stream: Stream, step: int) -> Tensor:
        return uniforms(1, stream, row=rows[:, None], step=step, position=at)

    noise = family.process.prior(tuple(text.shape), draws(Stream.PRIOR, 0))
    plain, _ = walk(model, case, name, knobs, rows, text, frozen)
    network = Network(model, family)
    watch = Watch(network, family.process, OpenPlaces(frozen, family.process), PARTS)
    steps = build_rule(name, family, knobs)(
        Segment(
            watch,
            family.process,
            family.schedule,
            torch.where(frozen, text, noise),
            steps=STEPS,
            frozen=frozen,
            uniforms=draws,
            controls=Controls(),
        )
    )
    seen = False
    for bare, raw in zip(plain, steps, strict=True):
        step = watch.fill(raw)
        assert torch.equal(step.canvas, bare.canvas)
        assert torch.equal(step.draft[frozen], text[frozen])
        assert not torch.isin(step.draft, torch.tensor(EXCLUDED)).any()
        assert len(step.confidence) == len(step.entropy) == len(step.changed)
        token = step.canvas.flatten()[step.changed] != MASK
        if step.remasked is not None:
            token &= ~torch.isin(step.changed, step.remasked)
        drawn_anew = family.process.replaces_tokens  # from a posterior, which noise is a part of
        assert (step.confidence[token] >= (0.0 if drawn_anew else 1e-300)).all()
        assert (step.confidence[token] <= 1.0 + 1e-12).all()
        assert step.confidence[~token].isnan().all()
        assert (step.entropy[token] <= torch.tensor(float(len(CLEAN))).log() + 1e-9).all()
        assert step.dependence.shape == (6,)
        assert (step.dependence >= -1e-12).all()
        shown = step.canvas != MASK
        if not family.process.replaces_tokens:
            assert torch.equal(step.draft[shown], step.canvas[shown])
        seen = seen or bool(token.any())
    assert seen
    assert torch.isin(step.draft, torch.tensor(CLEAN)).all()


def test_watched_numbers_are_those_of_the_network(model):
    text, frozen = holes(4, WIDTH)
    family = family_of("mdlm")
    network = Network(model, family)
    watch = Watch(network, family.process, OpenPlaces(frozen, family.process), PARTS)
    canvas = torch.where(frozen, text, MASK)
    masks = Positions.where(~frozen)
    open_positions = masks.flat
    t = torch.full((4,), 0.5, dtype=torch.float64)
    table = torch.zeros(canvas.numel(), ROWS, dtype=torch.float64)
    table[open_positions] = network(canvas, t, masks).log_x0
    positions = masks[torch.tensor([0, 3, 8])]
    prediction = watch(canvas, t, positions)
    assert torch.allclose(prediction.log_x0, table[positions.flat], rtol=0.0, atol=1e-12)
    rule = build_rule("threshold", family, {"threshold": 0.0})
    step = next(
        rule(
            Segment(
                watch,
                family.process,
                family.schedule,
                canvas,
                steps=9,
                frozen=frozen,
                uniforms=lambda stream, step: torch.full(canvas.shape, 0.3, dtype=torch.float64),
                controls=Controls(temperature=3.0),
            )
        )
    )
    filled = watch.fill(step)
    last = network(canvas, step.t, masks).log_x0
    drawn = step.canvas.flatten()[open_positions]
    assert torch.equal(step.changed, open_positions)
    chance = last.gather(1, drawn[:, None])[:, 0].exp()
    assert (filled.confidence - chance).abs().max() < 1e-12
    nats = -(last.exp() * last).nan_to_num(0.0).sum(-1)
    assert (filled.entropy - nats).abs().max() < 1e-12
    row = open_positions // WIDTH
    for r in range(1, 4):
        mine = nats[row == r]
        assert float(filled.dependence[r]) == pytest.approx(float(mine.sum() - mine.max()))


def test_unknown_parts_of_a_step_are_refused():
    with pytest.raises(ConfigError) as error:
        Watch(None, None, None, {"drafts"})
    assert error.value.code == "unknown_part"


# --- names and knobs ------------------------------------------------------------------------------


def test_configs_can_name_every_rule():
    for name in RULES:
        assert SampleConfig(rule=name).rule == name


@pytest.mark.parametrize("case", FITS)
def test_rules_fit_the_families_that_they_are_defined_for(case):
    family = family_of(case)
    assert {name for name, rule in RULES.items() if rule.refusal(family) is None} == FITS[case]
    for name in set(RULES) - FITS[case]:
        with pytest.raises(ConfigError) as error:
            check_rule(name, family)
        assert error.value.code == "unsuitable_rule"
        assert str(error.value).endswith(", ".join(n for n in RULES if n in FITS[case]))


def test_unknown_rules_and_knobs_are_refused_with_what_may_be_meant():
    family = family_of("mdlm")
    for name, knobs, code, hint in [
        ("treshold", {}, "unknown_rule", "did you mean 'threshold'?"),
        ("threshold", {"fator": 1.0}, "extra_forbidden", "did you mean 'factor'?"),
        ("first_hitting", {"eta": 1.0}, "extra_forbidden", "it has none"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(hint)) as error:
            build_rule(name, family, knobs)
        assert error.value.code == code


WRONG = [
    ("mdlm", "ancestral", {"greedy_tail": 1}, "bool_type"),
    ("mdlm", "confidence", {"order": "certainty"}, "literal_error"),
    ("mdlm", "confidence", {"order_temperature": -0.1}, "greater_than_equal"),
    ("mdlm", "confidence", {"positions": [0]}, "value_error"),
    ("mdlm", "confidence", {"positions": [1, 1], "order": "position"}, "value_error"),
    ("mdlm", "confidence", {"pace": 3}, "literal_error"),
    ("mdlm", "confidence", {"kind": "threshold"}, "literal_error"),
    ("mdlm", "threshold", {"threshold": 1.01}, "less_than_equal"),
    ("mdlm", "threshold", {"threshold": "0.9"}, "float_type"),
    ("mdlm", "threshold", {"factor": float("nan")}, "finite_number"),
    ("mdlm", "entropy_bound", {"entropy_bound": float("inf")}, "finite_number"),
    ("mdlm", "entropy_bound", {"entropy_bound": True}, "float_type"),
    ("mdlm", "remask", {"remasking": "max"}, "literal_error"),
    ("mdlm", "remask", {"eta": 2.0}, "less_than_equal"),
    ("mdlm", "remask", {"t_on": 0.05}, "value_error"),
    ("mdlm", "remask", {"alpha_on": 1.0}, "less_than"),
    ("gidd", "predictor_corrector", {"redraws": -1.0}, "greater_than_equal"),
    ("gidd", "predictor_corrector", {"corrections": 1.5}, "int_type"),
    ("gidd", "predictor_corrector", {"patience": 0}, "greater_than_equal"),
    ("gidd", "predictor_corrector", {"correction_time": 1.5}, "less_than_equal"),
]


@pytest.mark.parametrize(("case", "name", "knobs", "code"), WRONG, ids=str)
def test_knobs_out_of_range_are_refused_by_name(case, name, knobs, code):
    with pytest.raises(ConfigError, match=f"^rule {name}: .*{next(iter(knobs))} ") as error:
        build_rule(name, family_of(case), knobs)
    assert error.value.code == code


def shown_range(field: dict) -> str:
    """A knob's range as the documentation writes it, from its schema."""
    field = {**field, **field.get("anyOf", [{}])[0]}
    if field["type"] == "boolean":
        return "true, false"
    if "enum" in field:
        return ", ".join(field["enum"])
    if field["type"] == "array":
        return "distinct whole numbers"
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    return f"{low:g} or more" if high is None else f"{low:g} to {high:g}"


def test_every_knob_is_described_and_stands_in_the_docs(root):
    page = (root / "docs" / "sampling.md").read_text()
    for name, rule in RULES.items():
        section = page.split(f"### `{name}`")[1].split("\n##")[0]
        schema = rule.model_json_schema()["properties"]
        assert re.findall(r"^\| `(\w+)`", section, re.M) == list(rule.knobs())
        for knob, field in rule.knobs().items():
            assert field.description
            shown = "none" if field.default is None else str(field.default).lower()
            assert f"| `{knob}` | {shown} | {shown_range(schema[knob])} |" in section


# --- rules of users -------------------------------------------------------------------------------

OWN_RULE = '''
from typing import ClassVar, Literal
from pydantic import Field
from textdiff.sampling.rules import RULES, Rule

@RULES.register
class LeftToRight(Rule):
    """Reveals some masks per call, from left to right."""

    kind: Literal["left_to_right"] = "left_to_right"
    tokens: int = Field(1, ge=1, description="masks per call")
    processes: ClassVar[tuple[str, ...]] = ("absorbing",)
    task: ClassVar[str] = "reveals masks"

    def __call__(self, segment):
        masked = ~segment.frozen
        while masked.any():
            first = masked & (masked.cumsum(1) <= self.tokens)
            t = segment.schedule.t_of_alpha(1.0 - masked.double().mean(1))
            yield segment.reveal(first.flatten().nonzero().squeeze(1), t)
            masked = masked & ~first
'''


@pytest.fixture
def own_rule(tmp_path):
    path = tmp_path / "my_rule.py"
    path.write_text(OWN_RULE)
    spec = importlib.util.spec_from_file_location("my_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.LeftToRight
    del RULES._members["left_to_right"]


def test_a_rule_of_a_file_of_ones_own_works_by_its_name(model, own_rule):
    assert RULES["left_to_right"] is own_rule
    assert own_rule.knobs()["tokens"].description == "masks per call"
    for knobs, calls in (({}, WIDTH), ({"tokens": 4}, 3)):
        text, frozen = holes(6, WIDTH)
        steps, _ = walk(model, "mdlm", "left_to_right", knobs, torch.arange(6), text, frozen)
        assert len(steps) == calls
        assert torch.isin(steps[-1].canvas, torch.tensor(CLEAN)).all()
    job = Job([[], [CLEAN[0]]], [5, 4])
    *_, last = generate(
        model,
        family_of("mdlm").with_block_size(4),
        job,
        rule="left_to_right",
        steps=1,
        knobs={"tokens": 2},
        controls=Controls(),
        parts={"draft"},
    )
    assert last.draft is not None
    for name, case, knobs, code in [
        ("left_to_right", "udlm", {}, "unsuitable_rule"),
        ("left_to_right", "mdlm", {"tokens": 0}, "greater_than_equal"),
        ("left_to_rigth", "mdlm", {}, "unknown_rule"),
    ]:
        with pytest.raises(ConfigError) as error:
            build_rule(name, family_of(case), knobs)
        assert error.value.code == code
    assert "left_to_right" in str(error.value)


def test_rules_are_read_without_torch():
    code = (
        "import sys; from textdiff.sampling.rules import RULES; "
        "assert {name: rule().knobs() for name, rule in RULES.items()}; "
        "assert 'torch' not in sys.modules"
    )
    assert finished([sys.executable, "-c", code]).returncode == 0
