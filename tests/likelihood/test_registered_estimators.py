"""Estimators of the user's own: from a file, by their names, with flags for their options."""

import importlib.util
import json
import sys

import pytest
from children import finished
from small_tokenizers import bpe, model_of

from textdiff.cli import main
from textdiff.commands.scoring import estimator_help, option_flags
from textdiff.errors import ConfigError
from textdiff.likelihood.estimators import ESTIMATORS, build_estimator
from textdiff.likelihood.estimators.policy import SHARED

TOY = '''
"""An estimator that a user wrote."""

from typing import Literal

from pydantic import Field

from textdiff.likelihood.estimators import ESTIMATORS
from textdiff.likelihood.estimators.estimator import Estimator


@ESTIMATORS.register
class Flat(Estimator):
    """The same nats for every token."""

    kind: Literal["flat"] = "flat"
    samples: int = Field(1, ge=1, description="draws")
    height: float = Field(2.5, gt=0.0, description="nats of a token")

    def score(self, batch, scorer):
        return {"diffusion": (batch.zeros() + self.height * self.samples) * batch.scorable}
'''


@pytest.fixture
def flat(tmp_path, monkeypatch):
    monkeypatch.setattr(ESTIMATORS, "_members", dict(ESTIMATORS))
    path = tmp_path / "flat.py"
    path.write_text(TOY)
    spec = importlib.util.spec_from_file_location("flat", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_an_estimator_of_a_file_scores_by_its_name(flat, tmp_path, capsys):
    model_of(bpe()).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat")
    words = ["perplexity", str(tmp_path / "model"), str(tmp_path / "text.txt"), "--json"]
    capsys.readouterr()
    assert main([*words, "--estimator", "flat", "--samples", "2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["estimator"], record["mean"]) == ("flat", 5.0)
    assert record["estimator_settings"] == {"samples": 2, "height": 2.5}
    assert main([*words, "--estimator", "flta"]) == 2
    assert "did you mean 'flat'" in capsys.readouterr().err


def test_options_of_an_estimator_are_flags(flat):
    assert "flat: The same nats for every token." in estimator_help(ESTIMATORS).splitlines()
    flags = option_flags(ESTIMATORS)
    own = {"samples", "orders", "timesteps", "eps", "height"}
    assert own | {"rule", *SHARED} == set(flags.model_fields)
    assert flags(knobs=("order=margin",), ban=("a", "b")).ban == ("a", "b")
    assert flags(height=3.5).height == 3.5
    with pytest.raises(ConfigError) as error:
        build_estimator("flat", height=0.0)
    assert error.value.code == "greater_than"


def test_estimators_are_listed_without_torch():
    code = (
        "import sys; from textdiff.likelihood.estimators import ESTIMATORS; "
        "import textdiff.commands.perplexity; "
        "assert len(ESTIMATORS) == 9 and 'torch' not in sys.modules"
    )
    assert finished([sys.executable, "-c", code]).returncode == 0
