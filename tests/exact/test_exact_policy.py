"""The exact likelihood of a decoding rule: a distribution, and the one that it writes."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from engines import generate
from exact_stats import chi_square_p
from exact_tables import MASK, ROWS, TableDenoiser, all_sequences, code, family, random_table
from refusals import refused
from rule_worlds import forced, keyed, reader, run
from test_exact_ar import FAMILY as AR
from test_exact_conditional import scoring
from tiny_models import CLEAN, CONTEXT, tiny_family, tiny_model, tiny_pipeline
from torch import Tensor

from textdiff.diffusion.family import Family, build_family
from textdiff.errors import ConfigError, DataError
from textdiff.likelihood.estimators import build_estimator
from textdiff.likelihood.replicates import estimate
from textdiff.likelihood.windows import cut_windows
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.controls import NEUTRAL, Controls
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.rules import RULES, Rule, build_rule
from textdiff.sampling.rules.ordered import Confidence
from textdiff.sampling.teacher_forcing import ForcedEngine, policy_log_likelihood

LENGTH = 4
TEXTS = all_sequences(LENGTH)
TABLE = random_table(0, LENGTH)
BANNED = 2

RULES_WITH_KNOBS = [
    *(("confidence", {"order": order}) for order in ("probability", "margin", "entropy")),
    ("confidence", {"order": "position"}),
    ("confidence", {"order": "position", "positions": [2, 0, 9]}),
    ("confidence", {"pace": "noise"}),
    ("threshold", {"threshold": 0.8}),
    ("threshold", {"factor": 1.5}),
    ("entropy_bound", {"entropy_bound": 1.0}),
]


def without_banned(context, log_x0: Tensor) -> Tensor:
    """A ban, as a user writes it."""
    return log_x0.index_fill(-1, torch.tensor([BANNED]), -torch.inf)


SHAPED = {"temperature": 0.7, "top_p": 0.9}
CONTROLS = {"neutral": ({}, ()), "shaped": (SHAPED, (without_banned,))}


def law(rule: str, knobs: dict, steps: int, block: int | None, options: dict, hooks) -> Tensor:
    """[3 ** L] probability of every text."""
    config = NEUTRAL.merge(rule=rule, knobs=knobs, steps=steps, cache="off", **options)
    request = Request(Job([[None] * LENGTH] * len(TEXTS), [0] * len(TEXTS)), config, hooks)
    engine = ForcedEngine(TableDenoiser(TABLE), family(block), request, TEXTS)
    return engine.log_likelihoods().sum(1).exp()


@pytest.mark.parametrize("controls", CONTROLS)
@pytest.mark.parametrize("block", [1, 2, LENGTH, None])
@pytest.mark.parametrize(("rule", "knobs"), RULES_WITH_KNOBS, ids=str)
def test_probabilities_of_all_texts_add_up_to_one(rule, knobs, block, controls):
    options, hooks = CONTROLS[controls]
    laws = [law(rule, knobs, steps, block, options, hooks) for steps in range(1, LENGTH + 1)]
    for p in laws:
        assert abs(float(p.sum()) - 1.0) < 1e-12
        assert bool((p[(TEXTS == BANNED).any(1)] == 0.0).all()) == bool(hooks)
    if block is None and not hooks:  # the walk that gives every text its interval of uniforms
        wanted, _ = forced(build_rule(rule, family(), knobs), TABLE, LENGTH)
        assert (laws[-1] - wanted).abs().max() < 1e-12
        assert (laws[0] - laws[-1]).abs().max() > 1e-3  # the number of steps matters


def assert_sampled(counted: Tensor, p: Tensor) -> None:
    """Texts come as often as the likelihood says; those of probability 0 never."""
    counts = torch.bincount(code(counted), minlength=int(code(TEXTS).max()) + 1)[code(TEXTS)]
    assert int(counts[p == 0.0].sum()) == 0
    assert chi_square_p(counts[p > 0.0].double(), len(counted) * p[p > 0.0]) > 1e-3


def test_texts_are_written_as_often_as_the_likelihood_says():
    knobs, (options, hooks) = {"order": "margin"}, CONTROLS["shaped"]
    controls, start = Controls(**options, hooks=hooks), torch.full((200_000, LENGTH), MASK)
    rule = build_rule("confidence", family(), knobs)
    steps = run(rule, reader(TABLE), start, keyed(len(start), LENGTH), 2, controls=controls)
    assert_sampled(steps[-1].canvas, law("confidence", knobs, 2, None, options, hooks))


def test_blocks_are_written_as_often_as_the_likelihood_says():
    job, chosen = Job([[]] * 20_000, [LENGTH] * 20_000, seed=1), {"threshold": 0.8}
    options = {"rule": "threshold", "knobs": chosen, "steps": 2}
    *_, last = generate(TableDenoiser(TABLE), family(2), job, **options)
    assert_sampled(last.canvas, law("threshold", chosen, 2, 2, {}, ()))


def test_rules_that_draw_positions_are_refused_with_their_own_reason():
    qualifying = {name for name, rule in RULES.items() if rule().likelihood_refusal() is None}
    assert qualifying == {"confidence", "threshold", "entropy_bound"}
    for name in set(RULES) - qualifying:
        with refused(ConfigError, "no_exact_likelihood", RULES[name].chance, "confidence"):
            build_estimator("policy", rule=name)
    with refused(ConfigError, "no_exact_likelihood", "order_temperature 0.5; set it to 0"):
        build_estimator("policy", knobs={"order_temperature": 0.5})
    with refused(ConfigError, "unknown_rule", "confidence"):
        build_estimator("policy", rule="confidense")


class Twice(Confidence):
    """A rule of the user's that draws every token twice."""

    kind: Literal["twice"] = "twice"

    def __call__(self, segment):
        for step in super().__call__(segment):
            segment.draw(step.changed, torch.zeros(len(step.changed), ROWS), step.t)
            yield step


class Silent(Twice):
    """A rule of the user's that does not say how it picks positions."""

    kind: Literal["silent"] = "silent"
    chance = Rule.chance


@pytest.mark.parametrize(
    ("rule", "reason"), [(Twice, "not_written_once"), (Silent, "no_exact_likelihood")]
)
def test_rules_of_users_are_held_to_what_they_say(rule, reason, monkeypatch):
    monkeypatch.setattr(RULES, "_members", dict(RULES) | {"mine": rule})
    with refused(ConfigError, reason):
        law("mine", {}, 1, None, {}, ())


# --- the estimator -------------------------------------------------------------------------------


def windows(texts: Tensor, length: int, allowed: Tensor):
    arrays = [text.to(torch.int32).numpy() for text in texts]
    return cut_windows(arrays, ["x" * len(text) for text in texts], length, allowed)


def some_texts(rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.tensor(CLEAN)[torch.randint(len(CLEAN), (rows, length), generator=generator)]


@pytest.mark.parametrize("block", [None, 1, 2])
def test_left_to_right_one_by_one_is_the_chain_rule(block):
    chosen = family(block)
    cut = windows(TEXTS, LENGTH, chosen.process.vocabulary.clean)
    chain = estimate(TableDenoiser(TABLE), chosen, cut, estimator="chain_rule", seed=0)
    config = NEUTRAL.merge(rule="confidence", knobs={"order": "position"}, steps=LENGTH)
    walked = policy_log_likelihood(TableDenoiser(TABLE), chosen, TEXTS, config)
    assert (walked + chain.nats[0]).abs().max() < 1e-12


def test_an_autoregressive_model_has_the_chain_rule_bit_for_bit():
    model, cut = tiny_model(seed=3), windows(some_texts(6, 9), CONTEXT, AR.process.vocabulary.clean)
    chain = estimate(model, AR, cut, estimator="chain_rule", seed=0)
    policy = estimate(model, AR, cut, estimator="policy", seed=0)
    assert torch.equal(policy.nats, chain.nats)
    assert policy.calls_per_token == 1.0
    walked = -policy_log_likelihood(model, AR, some_texts(6, 9), NEUTRAL.merge(rule="confidence"))
    assert (walked - chain.nats[0]).abs().max() < 1e-10


@pytest.mark.parametrize("rule", ["confidence", "threshold"])
def test_a_cache_changes_nothing_and_texts_may_end_within_a_block(rule):
    model, chosen, texts = tiny_model(seed=2), tiny_family(4), some_texts(5, 10)
    cut = windows(texts, CONTEXT, chosen.process.vocabulary.clean)
    found = estimate(
        model, chosen, cut, estimator="policy", rule=rule, steps=3, seed=0, attribute=True
    )
    uncached = policy_log_likelihood(model, chosen, texts, NEUTRAL.merge(rule=rule, steps=3))
    assert (found.nats[0] + uncached).abs().max() < 1e-10
    assert found.nats.std() > 0.1
    each = torch.stack([nats.sum() for nats in found.token_nats()])
    assert (each - found.nats[0]).abs().max() < 1e-12
    many = estimate(
        model, chosen, cut, estimator="policy", rule=rule, steps=3, seed=0, batch_tokens=12
    )
    assert (many.nats - found.nats).abs().max() < 1e-10
    if rule == "confidence":  # 3, 3 and 2 calls for blocks of 4, 4 and 2 tokens
        assert found.calls_per_token == pytest.approx(8 / 10)


@pytest.mark.parametrize("scored", [(2, 3), (0, 2)], ids=str)
def test_the_open_part_of_a_text_is_written_given_the_rest(scored):
    """Probabilities of all fillings add up to one for each of the texts around them."""
    chosen, table = family(), random_table(0)
    texts = all_sequences(3)
    scored = tuple(place for place in scored if place < 3)
    cut = scoring(texts, scored, chosen.process.vocabulary.clean)
    found = estimate(TableDenoiser(table), chosen, cut, estimator="policy", steps=1, seed=0)
    rest = [place for place in range(3) if place not in scored]
    around = code(texts[:, rest])
    mass = torch.zeros(int(around.max()) + 1, dtype=torch.float64)
    mass = mass.index_add(0, around, (-found.nats[0]).exp())
    assert (mass[around] - 1.0).abs().max() < 1e-12
    assert found.windows.document_tokens.tolist() == [len(scored)] * len(texts)


def test_a_text_that_is_never_written_has_probability_zero():
    chosen, options = family(), {"estimator": "policy", "temperature": 0.0, "seed": 0}
    cut = windows(TEXTS, LENGTH, chosen.process.vocabulary.clean)
    found = estimate(TableDenoiser(TABLE), chosen, cut, **options)
    assert sorted(found.nats[0].tolist())[:2] == [0.0, math.inf]
    bound = found.bound()
    assert (bound.impossible, bound.perplexity, bound.text_stderr) == (80, math.inf, None)
    assert bound.to_dict()["mean"] is None
    best = int(found.nats[0].argmin())
    assert found.document(best).perplexity == 1.0
    *_, last = generate(
        TableDenoiser(TABLE),
        chosen,
        Job([[]], [LENGTH]),
        rule="confidence",
        steps=64,
        controls=Controls(temperature=0.0),
    )
    assert torch.equal(last.canvas[0], TEXTS[best])


def test_gradients_are_those_of_finite_differences():
    model, chosen, texts = tiny_model(seed=4), tiny_family(4), some_texts(8, 6)
    config = NEUTRAL.merge(rule="confidence", steps=2, temperature=0.8, top_p=0.97)
    scored = torch.tensor([[False] + [True] * 5] * 8)
    weight = model.output_layer.linear.weight

    def value() -> Tensor:
        return policy_log_likelihood(model, chosen, texts, config, scored)[finite].sum()

    finite = policy_log_likelihood(model, chosen, texts, config, scored).isfinite()
    assert 1 < int(finite.sum()) < 8  # of the others top-p leaves nothing
    value().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    sums = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight.add_(sign * 1e-6 * direction)
            sums.append(float(value()))
            weight.sub_(sign * 1e-6 * direction)
    slope = float((weight.grad * direction).sum())
    assert slope == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-6)
    assert abs(slope) > 1e-2


# --- texts, through the object that users hold ---------------------------------------------------


@pytest.fixture(scope="module")
def held() -> TextDiffusion:
    return tiny_pipeline("char", 4, ["abc"])


EVERY = [
    "".join("abc"[i] for i in digits) for digits in torch.cartesian_prod(*[torch.arange(3)] * 3)
]


def test_bans_and_prompts_are_those_of_a_generation(held):
    """Texts end where they end: those with an end-of-text token are the rest of the mass."""
    options = {"estimator": "policy", "steps": 2}
    spans = [[(1, 4)]] * len(EVERY)  # a hole: text stands on both sides, so that nothing ends
    around = [f"a{text}"[:4] for text in EVERY]
    free = held.score(around, spans=spans, **options)
    assert all(bound.estimator == "policy" and bound.is_bound for bound in free)
    banned = held.score(around, spans=spans, ban=("bc",), **options)
    for text, bound in zip(EVERY, banned, strict=True):
        assert (bound.impossible == 1) == ("bc" in text)
    share = sum(math.exp(-bound.mean * bound.tokens) for bound in banned)
    assert share <= 1.0 + 1e-9
    prompted = held.score(EVERY, prompts=["a"] * len(EVERY), **options)
    assert [b.mean for b in prompted] == pytest.approx([b.mean for b in free], abs=1e-12)


def uniform_family(held: TextDiffusion) -> Family:
    spec = {
        "process": "uniform",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "udlm"},
        "block_size": None,
    }
    return build_family(spec, held.family.process.vocabulary)


def test_what_the_estimator_cannot_score_is_refused(held):
    with refused(ConfigError, "end_of_text_of_policy", "--end-of-text"):
        held.estimate(["abc"], estimator="policy", end_of_text=True)
    with refused(ConfigError, "unsuitable_rule"):
        uniform = replace(held, family=uniform_family(held))
        uniform.estimate(["abc"], estimator="policy")
    with refused(ConfigError, "no_exact_likelihood", "uniform"):
        uniform.estimate(["abc"], estimator="policy", rule="threshold")
    with refused(DataError, "impossible_text", "top_k"):
        held.compare(held, EVERY, estimator="policy", temperature=0.0)
