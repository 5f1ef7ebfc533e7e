"""Pieces of real text, grids, the excess over a curve, MAUVE from histograms."""

import json
import math

import numpy as np
import pytest
from tiny_judges import export

from textdiff.errors import ConfigError, DataError
from textdiff.evaluate.figures import Histograms, area, mauve
from textdiff.evaluate.frontier import Place, default_grid, excess, read_grid
from textdiff.evaluate.presentation import _series, free_of_cost
from textdiff.evaluate.suites import of_sequences, real_pieces, text_set_of
from textdiff.pipeline import TextDiffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TextDiffusion.from_pretrained(export(tmp_path_factory.mktemp("m") / "a", "mdlm"), "cpu")


def test_real_text_is_cut_and_ended_as_samples_are(model):
    documents = ["abcdefgh", "xy", "0123456789" * 3]
    first, others = real_pieces(model, documents, 6, 3)
    # abcdef gh.xy. 012345 678901 ...: seven rows, three for either side
    assert first.texts[0] == "abcdef"
    assert first.ended[0] is False
    assert others.texts[0] == "gh"
    assert others.ended[0] is True
    assert len(first) == len(others) == 3
    assert first.tokens[0] == model.tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    once, nothing = real_pieces(model, documents, 6, 4)
    assert nothing is None
    assert len(once) == 4
    with pytest.raises(DataError) as error:
        real_pieces(model, documents, 6, 8)
    assert error.value.code == "too_little_reference"
    # Samples that may not end before 6 tokens stand beside rows that do not either.
    long, _ = real_pieces(model, documents, 6, 5, least=6)
    assert all(len(ids) == 6 for ids in long.tokens)
    with pytest.raises(DataError) as error:
        real_pieces(model, documents, 6, 7, least=6)
    assert error.value.code == "too_little_reference"


def test_sequences_end_where_they_end(model):
    end = model.tokenizer.eos_token_id
    ids = model.tokenizer("ab", add_special_tokens=False)["input_ids"]
    found = of_sequences(model, [[*ids, end, *ids], ids])
    assert found.texts == ["ab", "ab"]
    assert found.tokens == [ids, ids]
    assert found.ended == [True, False]
    assert text_set_of(model, ["ab"]).ended is None


def test_a_grid_is_multiplied_out(model):
    content = {
        "baseline": {"rule": "first_hitting", "temperature": [0.8, 1.0]},
        "points": [
            {"rule": "threshold", "threshold": [0.5, 0.9], "temperature": [0.8, 1.0], "steps": 8},
            {"rule": "ancestral", "steps": 4, "temperature": 1.0},
            {"rule": "predictor_corrector", "steps": 4, "temperature": 1.0},
            {"rule": "ancestral", "steps": 4, "temperature": 1.0},
        ],
    }
    settings, left_out = read_grid(content, model.family)
    curves = [setting.curve for setting in settings]
    assert curves[0] == curves[1] == "first_hitting"
    assert curves[2:] == ["threshold 0.5, 8 steps"] * 2 + ["threshold 0.9, 8 steps"] * 2 + [
        "ancestral, 4 steps"
    ]
    assert settings[2].options["knobs"] == {"threshold": 0.5}
    assert list(left_out) == ["predictor_corrector"]
    assert [setting.baseline for setting in settings[:3]] == [True, True, False]


def test_every_family_has_a_default_grid(model):
    settings, left_out = read_grid(default_grid(model.family, 16), model.family)
    assert {s.options["rule"] for s in settings} >= {"ancestral", "threshold", "entropy_bound"}
    assert set(left_out) == {"tweedie", "predictor_corrector"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"points": []}, "`baseline` is one entry"),
        ({"baseline": {"rule": "first_hitting"}, "points": {"rule": "x"}}, "a list of them"),
        ({"baseline": {"rule": "first_hitting"}, "plots": []}, "unknown key 'plots'"),
        ({"baseline": {"rule": "first_hiting"}}, "did you mean 'first_hitting'"),
        ({"baseline": {"rule": "tweedie"}}, "follows scores"),
        ({"baseline": {"rule": "threshold", "treshold": 1}}, "did you mean 'threshold'"),
        ({"baseline": {"rule": "threshold", "threshold": 2.0}}, "threshold"),
    ],
)
def test_wrong_grids_are_one_sentence(model, content, message):
    with pytest.raises(ConfigError, match=message):
        read_grid(content, model.family)


def test_excess_is_the_distance_straight_up():
    curve = [Place(3.0, 2.0, (0.0, 0.0, 0.01)), Place(1.0, 1.0, (0.0, 0.0, 0.01))]
    found = excess(Place(2.0, 1.7, (0.0, 0.0, 0.02)), curve)
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(1.96 * math.sqrt(0.02 + 0.005), rel=1e-4)
    assert not excess(Place(3.1, 1.7, (0.0, 0.0, 0.0)), curve).defined
    # An error along the curve is none: the point only slides on it.
    slide = excess(
        Place(2.0, 1.5, (0.04, 0.02, 0.01)), [Place(p.entropy, p.log_ppl, (0, 0, 0)) for p in curve]
    )
    assert slide.high - slide.low == pytest.approx(0.0, abs=1e-6)


def test_what_counts_as_free_is_shown_not_merely_possible():
    def point(tokens, high):
        return {"tokens_per_call": tokens, "excess": {"value": 0.0, "low": -0.5, "high": high}}

    sure, better, unsure = point(2.0, 0.04), point(3.0, -0.1), point(4.0, 0.5)
    beyond = {"tokens_per_call": 9.0, "excess": {"value": None, "low": None, "high": None}}
    baseline = {"tokens_per_call": 1.0, "excess": None}
    points = [baseline, sure, better, unsure, beyond]
    assert free_of_cost({"points": points}) is better
    assert free_of_cost({"points": [baseline, unsure, beyond]}) is None


def test_mauve_by_hand():
    same = np.array([[0.5, 0.5]])
    assert area(same, same)[0] == pytest.approx(1.0)
    apart = area(np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))[0]
    # Nothing shared: KL(Q|R) = -log(1 - w), KL(P|R) = -log w, a curve of ((1-w)^5, w^5), whose area
    # is that of the beta function B(6, 5) * 5 = 1/252 to the fineness of the grid.
    assert apart == pytest.approx(1 / 252, rel=0.05)
    half = area(np.array([[0.5, 0.5, 0.0]]), np.array([[0.0, 0.5, 0.5]]))[0]
    assert apart < half < 1.0


def test_mauve_is_less_where_laws_differ_and_its_interval_holds_it():
    counts = Histograms(np.array([20.0, 30.0, 14.0]), np.array([30.0, 20.0, 14.0]))
    found = mauve(counts, 500, 0)
    assert found.low < found.value < found.high <= 1.0
    assert found.value < mauve(Histograms(counts.samples, counts.samples), 100, 0).value


def test_the_area_is_that_of_the_package():
    package = pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4)).astype(np.float32), rng.normal(0.7, 1, size=(60, 4))
    found = package.compute_mauve(
        p_features=features[0], q_features=features[1], num_buckets=6, verbose=False
    )
    assert area(found.p_hist[None], found.q_hist[None])[0] == pytest.approx(found.mauve, abs=0.01)


def test_grid_keys_survive_json(model):
    settings, _ = read_grid(default_grid(model.family, 8), model.family)
    assert len({s.key for s in settings}) == len(settings)
    assert all(json.loads(setting.key) for setting in settings)


def test_settings_of_one_rule_look_alike_and_can_be_told_apart(root):
    points = json.loads((root / "evals" / "results" / "frontier.json").read_text())["points"]
    series = _series([point for point in points if not point["baseline"]])
    assert sum(len(mine) for mine, _ in series) == sum(not point["baseline"] for point in points)
    looks = {(style["color"], style["marker"], style["fillstyle"]) for _, style in series}
    assert len(looks) == len(series)
    for mine, style in series:
        (rule,) = {point["sampling"]["rule"] for point in mine}
        assert len({json.dumps(point["sampling"]["knobs"]) for point in mine}) == 1
        assert style["label"].startswith(rule)
        assert "steps" not in style["label"]
    colours = {(mine[0]["sampling"]["rule"], style["color"]) for mine, style in series}
    assert len(colours) == len({rule for rule, _ in colours}) == len({c for _, c in colours})
