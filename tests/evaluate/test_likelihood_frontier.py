"""The suite `likelihood-frontier`: points are exact likelihoods of the reference, and are kept."""

import json

import pytest
import yaml
from refusals import refused
from tiny_judges import export

from textdiff.cli import main
from textdiff.errors import ConfigError
from textdiff.evaluate.fixed_order import OrderSearch, split_grid
from textdiff.evaluate.likelihood_frontier import default_points, read_points
from textdiff.pipeline import TextDiffusion

TEXTS = [f"the {word} sat"[:12] for word in ("cat", "dog", "mat", "hill", "a", "b", "ran", "on")]
POINTS = [
    {"rule": "confidence", "order": ["position", "margin"], "steps": [16, 2]},
    {"rule": "threshold", "threshold": 0.01},
    {"rule": "first_hitting"},
]
SEARCH = {"documents": 8, "beam": 2}
OTHERS = [f"a {text}"[:12] for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    export(folder / "model", "mdlm")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS + OTHERS)
    (folder / "text.jsonl").write_text(rows)
    (folder / "grid.yaml").write_text(yaml.safe_dump({"points": POINTS, "order_search": SEARCH}))
    return folder


def test_points_are_likelihoods_of_the_reference(folder, capsys):
    out = folder / "out.json"
    words = ["evaluate", str(folder / "model"), "--suite", "likelihood-frontier", "--device", "cpu"]
    words += ["--reference", str(folder / "text.jsonl"), "--grid", str(folder / "grid.yaml")]
    words += ["--output", str(out), "--picture", str(folder / "out.png"), "--num-samples", "8"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert (record["complete"], record["documents"]) == (True, 8)
    assert "first_hitting draws the position" in printed
    points = {point["curve"]: point for point in record["points"]}
    assert len(points) == len(record["points"]) == 6
    model = TextDiffusion.from_pretrained(folder / "model", "cpu")
    chain = model.estimate(TEXTS, estimator="chain_rule").bound()
    one_by_one = points["confidence order position, 16 steps"]
    assert one_by_one["nats"] == pytest.approx(chain.mean, abs=1e-5)
    assert one_by_one["text_stderr"] == pytest.approx(chain.text_stderr, abs=1e-5)
    assert one_by_one["tokens_per_call"] == 1.0
    assert one_by_one["over_bound"]["nats"] == pytest.approx(
        chain.mean - record["bound"]["mean"], abs=1e-5
    )
    fast = points["threshold 0.01"]  # everything at once
    assert fast["tokens_per_call"] == pytest.approx(chain.tokens / 8)
    assert {point["line"] for point in record["points"]} == {
        *("confidence position", "confidence margin", "threshold", "best fixed order found")
    }
    assert_searched(points["best fixed order found"], model)
    assert (folder / "out.png").stat().st_size > 10_000
    before = out.read_text()
    assert main(words) == 0  # goes on from all of its points
    assert json.loads(out.read_text())["points"] == json.loads(before)["points"]


def assert_searched(point, model):
    """The order is searched on the documents after the scored ones, which it is reported on."""
    places = point["search"]["places"]
    assert sorted(places) == list(range(12))
    assert (point["search"]["best"], point["tokens_per_call"]) == (False, 1.0)
    rule = {"estimator": "policy", "rule": "confidence", "steps": 12}
    knobs = {"order": "position", "positions": places}
    scored, others = (model.estimate(t, knobs=knobs, **rule).bound() for t in (TEXTS, OTHERS))
    assert point["nats"] == pytest.approx(scored.mean, abs=1e-6)
    assert point["search"]["nats_per_token"] == pytest.approx(others.mean, abs=1e-4)


def test_a_search_takes_documents_that_are_not_scored():
    with refused(ConfigError, "too_few_texts"):
        OrderSearch(documents=9).texts(TEXTS)
    for wrong in ({"documents": 4}, {"width": 3}, [3]):
        with refused(ConfigError, "order_search"):
            split_grid({"order_search": wrong})


def test_a_grid_has_rules_with_a_likelihood(folder):
    family = TextDiffusion.from_pretrained(folder / "model", "cpu").family
    settings, left_out = read_points(default_points(4), family)
    rules = {setting.options["rule"] for setting in settings}
    assert (rules, left_out) == ({"confidence", "threshold", "entropy_bound"}, {})
    with refused(ConfigError, "no_exact_likelihood", "first_hitting"):
        read_points({"points": [{"rule": "first_hitting"}]}, family)
    with refused(ConfigError, "grid_shape"):
        read_points({"baseline": {"rule": "confidence"}, "points": []}, family)
