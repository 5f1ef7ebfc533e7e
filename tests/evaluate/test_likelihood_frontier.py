"""The suite `likelihood-frontier`: points are exact likelihoods of the reference, and are kept."""

import json

import pytest
import yaml
from refusals import refused
from tiny_judges import export

from textdiff.cli import main
from textdiff.errors import ConfigError
from textdiff.evaluate.likelihood_frontier import default_points, read_points
from textdiff.pipeline import TextDiffusion

TEXTS = [f"the {word} sat"[:12] for word in ("cat", "dog", "mat", "hill", "a", "b", "ran", "on")]
POINTS = [
    {"rule": "confidence", "order": ["position", "margin"], "steps": [16, 2]},
    {"rule": "threshold", "threshold": 0.01},
    {"rule": "first_hitting"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frontier")
    export(folder / "model", "mdlm")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "grid.yaml").write_text(yaml.safe_dump({"points": POINTS}))
    return folder


def test_points_are_likelihoods_of_the_reference(folder, capsys):
    out = folder / "out.json"
    words = ["evaluate", str(folder / "model"), "--suite", "likelihood-frontier", "--device", "cpu"]
    words += ["--reference", str(folder / "text.jsonl"), "--grid", str(folder / "grid.yaml")]
    words += ["--output", str(out), "--picture", str(folder / "out.png")]
    assert main(words) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert (record["complete"], record["documents"]) == (True, 8)
    assert "first_hitting draws the position" in printed
    points = {point["curve"]: point for point in record["points"]}
    assert len(points) == len(record["points"]) == 5
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
        *("confidence position", "confidence margin", "threshold")
    }
    assert (folder / "out.png").stat().st_size > 10_000
    before = out.read_text()
    assert main(words) == 0  # goes on from all of its points
    assert json.loads(out.read_text())["points"] == json.loads(before)["points"]


def test_a_grid_has_rules_with_a_likelihood(folder):
    family = TextDiffusion.from_pretrained(folder / "model", "cpu").family
    settings, left_out = read_points(default_points(4), family)
    rules = {setting.options["rule"] for setting in settings}
    assert (rules, left_out) == ({"confidence", "threshold", "entropy_bound"}, {})
    with refused(ConfigError, "no_exact_likelihood", "first_hitting"):
        read_points({"points": [{"rule": "first_hitting"}]}, family)
    with refused(ConfigError, "grid_shape"):
        read_points({"baseline": {"rule": "confidence"}, "points": []}, family)
