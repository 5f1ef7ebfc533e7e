"""What docs/evaluation.md says is what the code does."""

import re

import yaml
from tiny_judges import export

from textdiff.evaluate.frontier import read_grid
from textdiff.evaluate.suites import SUITES
from textdiff.evaluate.text_metrics import METRICS
from textdiff.pipeline import TextDiffusion


def test_every_figure_and_suite_is_explained(root):
    text = (root / "docs" / "evaluation.md").read_text()
    parts = {re.sub(r"_[234]$", "_1", name) for name in METRICS}  # a row names the first and last
    assert [name for name in parts if f"`{name}`" not in text] == []
    assert [name for name in SUITES if name not in text] == []


def test_the_grid_shown_is_one(root, tmp_path):
    text = (root / "docs" / "evaluation.md").read_text()
    (shown,) = re.findall(r"```yaml\n(.+?)```", text, flags=re.S)
    model = TextDiffusion.from_pretrained(export(tmp_path / "model", "mdlm"), "cpu")
    settings, left_out = read_grid(yaml.safe_load(shown), model.family)
    assert len(settings) == 4 + 6 + 2 + 2
    assert not left_out
