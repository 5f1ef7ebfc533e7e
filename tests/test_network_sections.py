"""The `model` section: two kinds of network, and what weights of another model bring with them."""

import json

import pytest
import yaml
from refusals import refused

from textdiff.cli import main
from textdiff.config import Config
from textdiff.config.networks import TextDiffNetwork, TransformersNetwork
from textdiff.config.reading import load, to_yaml, validate
from textdiff.errors import ConfigError

BPE = {"tokenizer": {"kind": "bpe"}}


def test_a_section_without_a_kind_is_of_our_own_network():
    """Configs and checkpoints from before there was a choice."""
    older = Config().model_dump(mode="json")
    assert older["model"].pop("kind") == "textdiff"
    assert validate(older) == Config()
    assert validate({"model": {"num_layers": 3}}).model == TextDiffNetwork(num_layers=3)


def test_flags_choose_the_network(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {steps: 3}\n")
    words = ["--model.kind", "transformers", "--model.path=x", "--model.noise-embedding=true"]
    assert load(path, words).model == TransformersNetwork(path="x", noise_embedding=True)


def test_weights_of_a_model_bring_its_architecture_and_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = validate({"train": {"init_from": "hf:~/x"}})
    assert config.train.init_from == f"hf:{tmp_path}/x"
    assert config.model == TransformersNetwork(path=f"{tmp_path}/x")
    assert (config.tokenizer.kind, config.tokenizer.path) == ("pretrained", f"{tmp_path}/x")
    assert validate(yaml.safe_load(to_yaml(config))) == config
    given = {"model": {"kind": "transformers", "path": "y"}, "train": {"init_from": "hf:x"}}
    assert validate(given).model.path == "y"
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    words = ["--train.init-from=hf:me/x", "--model.kind=transformers", "--tokenizer.path=z"]
    assert main(["config", "show", str(path), *words, "--tokenizer.kind=pretrained"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["path"], shown["tokenizer"]["path"]) == ("me/x", "z")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model": {"kind": "transformers"}}, ["`model.path` is missing"]),
        ({"model": {"kind": "mamba"}}, ["`model.kind` is mamba", "'textdiff', 'transformers'"]),
        (
            {"model": {"kind": "transformers", "path": "x", "num_layers": 3}},
            ["unknown key `model.num_layers`", "of kind transformers"],
        ),
        (
            {"train": {"init_from": "hf:x"}, "model": {"num_layers": 3}},
            ["train.init_from hf:x needs model.kind: transformers"],
        ),
        (
            {"train": {"init_from": "hf:x"}, **BPE},
            ["tokens that its weights were trained on", "tokenizer: {kind: pretrained, path: x}"],
        ),
        (
            {
                "model": {"kind": "transformers", "path": "x"},
                "diffusion": {"process": "uniform", "objective": {"kind": "udlm"}},
            },
            ["process uniform needs model.noise_embedding: true"],
        ),
        (
            {
                "model": {"kind": "transformers", "path": "x", "noise_embedding": True},
                "diffusion": {"objective": {"kind": "ar"}, "block_size": 1},
            },
            ["objective ar has no noise level: set model.noise_embedding: false"],
        ),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_sections_that_do_not_fit(raw, words):
    with refused(ConfigError, None, *words):
        validate(raw)
