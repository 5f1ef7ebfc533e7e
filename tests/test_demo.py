"""The model that comes with the package."""

import json

import torch
from transformers import AutoModelForCausalLM

from textdiff import TextDiffusion
from textdiff.cli import main
from textdiff.export.loading import DEMO, locate
from textdiff.models import CAUSAL


def test_the_demo_is_small_and_licensed():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 1_500_000
    assert "MIT License" in (DEMO / "LICENSE").read_text()
    assert (DEMO / "recipe.yaml").is_file()


def test_the_demo_writes_a_story(capsys):
    words = ["generate", "demo", "Once upon a time", "--max-new-tokens", "24", "--json"]
    assert main(words) == 0
    text = json.loads(capsys.readouterr().out)["samples"][0]["text"]
    assert text.startswith("Once upon a time, there was a ")  # as most of its stories do


def test_the_demo_has_the_bound_of_its_card():
    model = TextDiffusion.from_pretrained("demo")
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    assert model.score([story], seed=0)[0].mean < 1.5  # a random text has ln 512 = 6.2
    assert model.family.block_size == 4


def test_a_model_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert locate("demo") == DEMO
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert locate("demo").resolve() == (tmp_path / "demo").resolve()


def test_the_demo_is_an_ordinary_llama_folder():
    network = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model = TextDiffusion.from_pretrained("demo").model
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(network(ids).logits, model(ids, layout=CAUSAL).logits)


def test_play_without_a_model_opens_the_demo(monkeypatch, capsys):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("One day\n"))
    assert main(["play", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("One day")
