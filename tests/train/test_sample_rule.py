"""Samples of a run: their rule is checked before anything is trained; calls are not recorded."""

import torch
from refusals import refused

from textdiff.config import Config
from textdiff.data.sections import CharTokenizer
from textdiff.data.tokenizer import train_tokenizer
from textdiff.errors import ConfigError
from textdiff.train.setup import build_model
from textdiff.train.validation import Validation


def test_a_rule_that_does_not_fit_the_model_stops_the_run_before_it_begins():
    tokenizer = train_tokenizer(CharTokenizer(), ["ab cd"])
    config = Config.model_validate(
        {"model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}, "sample": {"rule": "euler"}}
    )
    with refused(ConfigError, "unsuitable_rule", "rule euler follows scores, which this objective"):
        build_model(config, tokenizer, torch.device("cpu"))
    fits = config.model_copy(update={"sample": config.sample.model_copy(update={"rule": "remask"})})
    build_model(fits, tokenizer, torch.device("cpu"))


FLAGS = (
    "--train.steps=2",
    "--evaluate.every=2",
    "--sample.num-samples=1",
    "--evaluate.max-documents=1",
)


def test_samples_take_no_memory_for_recorded_calls(runs, monkeypatch):
    drawn, recorded = Validation._drawn, []

    def watched(self):
        recorded.append(self.model.model.cuda_graphs)
        return drawn(self)

    monkeypatch.setattr(Validation, "_drawn", watched)
    runs.train("samples", *FLAGS)
    assert recorded == [False]
