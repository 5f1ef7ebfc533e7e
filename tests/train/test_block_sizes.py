"""Runs in several block sizes and under searched mask rates: resumed, served, started from."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from textdiff import TextDiffusion
from textdiff.cli import main
from textdiff.errors import ConfigError
from textdiff.train.measure import TIMED

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: char}}
model: {{hidden_size: 16, num_layers: 1, num_heads: 2}}
diffusion: {{block_size: [8, 4, null], noise: {{range: search}}}}
train: {{steps: 12, global_batch_size: 8, micro_batch_size: 4, warmup_steps: 2, log_every: 1,
         learning_rate: 0.01, mixed_precision: fp32, checkpoint_every: 100}}
evaluate: {{every: 4, max_documents: 1}}
sample: {{num_samples: 0, max_new_tokens: 8, steps: 4}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    lines = "".join(f"Row {i} of {i * i % 97} is here.\n" for i in range(120))
    (folder / "corpus.txt").write_text(lines)
    (folder / "c.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def train(folder: Path, name: str, *flags: str) -> list[dict]:
    done = main(["train", str(folder / "c.yaml"), f"--run.dir={folder / name}", *flags])
    assert done == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def run(folder) -> list[dict]:
    return train(folder, "run")


def evaluations(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "bound_nats" in line]


def test_every_evaluation_searches_each_block_size(run):
    found = evaluations(run)
    assert [line["step"] for line in found] == [4, 8, 12]
    for line in found:
        for ending in ("", "_4", "_full"):
            low, high = line["noise_low" + ending], line["noise_high" + ending]
            assert 0.5 <= round(high - low, 10) <= 1.0
            unclipped = line["loss_variance_unclipped" + ending]
            assert 0.0 < line["loss_variance" + ending] <= unclipped
    ranges = {tuple(line[f"noise_{end}{s}"] for end in ("low", "high")) for s in ("", "_4")
              for line in found}  # fmt: skip
    assert ranges != {(0.0, 1.0)}


def test_a_resumed_run_is_the_run_that_was_not_interrupted(folder, run):
    """Stopped between evaluations: the ranges in force come from the checkpoint."""
    flags = ("--train.lr-schedule=constant", "--train.checkpoint-every=6")
    whole = train(folder, "whole", *flags)
    last = folder / "whole" / "checkpoints" / "step-000006"
    state = json.loads((last / "trainer.json").read_text())
    in_force = evaluations(whole)[0]
    assert [0.0, 1.0] not in [rates for _, rates in state["noise_ranges"][:2]]
    assert state["noise_ranges"][0] == [8, [in_force["noise_low"], in_force["noise_high"]]]
    resumed = train(folder, "whole", *flags, f"--resume={last}")
    plain = [[{k: v for k, v in line.items() if k not in TIMED} for line in lines]
             for lines in (whole, resumed)]  # fmt: skip
    assert plain[0] == plain[1]


def test_the_reported_bounds_are_those_of_the_export(folder, run):
    model = TextDiffusion.from_pretrained(folder / "run")
    assert model.block_sizes == (8, 4, None)
    texts = [
        json.loads(line)["text"]
        for line in (folder / "run" / "validation.jsonl").read_text().splitlines()
    ]
    last = evaluations(run)[-1]
    for size, ending in ((8, ""), (4, "_4"), (None, "_full")):
        bound = model.with_block_size(size).estimate(texts).bound()
        assert bound.mean == pytest.approx(last["bound_nats" + ending], abs=1e-6)
    assert model.family.block_size == 8
    assert len({last["bound_nats" + ending] for ending in ("", "_4", "_full")}) == 3


def test_sizes_that_were_not_trained_are_refused_unless_insisted_on(folder, run, capsys):
    model = TextDiffusion.from_pretrained(folder / "run")
    said = "trained on whole sequences and in blocks of 8 and 4, not in blocks of 16"
    with pytest.raises(ConfigError, match=said):
        model.with_block_size(16)
    assert model.with_block_size(16, trained=False).family.block_size == 16
    for size in (0, 33):
        with pytest.raises(ConfigError, match="give 1 to 32"):
            model.with_block_size(size, trained=False)
    export = str(folder / "run" / "export")
    assert main(["generate", export, "Row", "--block-size", "16"]) == 2
    assert said in capsys.readouterr().err
    texts = {}
    for flags in ((), ("--block-size=8",), ("--block-size=4",), ("--block-size=full",)):
        words = ["generate", export, "Row", "--max-new-tokens=24", "--json", *flags]
        assert main(words) == 0
        texts[flags[-1:]] = json.loads(capsys.readouterr().out)["samples"][0]["text"]
    assert texts[()] == texts[("--block-size=8",)]
    assert len(set(texts.values())) > 1
    bounds = {}
    validation = str(folder / "run" / "validation.jsonl")
    for size in ("8", "4", "full"):
        assert main(["perplexity", export, validation, "--json", f"--block-size={size}"]) == 0
        record = json.loads(capsys.readouterr().out)
        bounds[size] = record["mean"]
        assert record["block_size"] == (None if size == "full" else int(size))
    last = evaluations(run)[-1]
    for size, ending in (("8", ""), ("4", "_4"), ("full", "_full")):
        assert bounds[size] == pytest.approx(last["bound_nats" + ending], abs=1e-6)


# --- starting from a model of the whole sequence --------------------------------------------------


@pytest.fixture(scope="module")
def whole_sequence(folder) -> Path:
    train(folder, "mdlm", "--diffusion.block-size=null", "--train.steps=2")
    return folder / "mdlm" / "export"


def test_blocks_start_at_exactly_the_weights_of_a_whole_sequence_model(
    folder, whole_sequence, monkeypatch
):
    from textdiff.config.reading import load
    from textdiff.data.corpus import prepare_corpus
    from textdiff.train.setup import build_model

    def never(*arguments, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(pickle, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    config = load(folder / "c.yaml", [f"--train.init-from={whole_sequence}"])
    tokenizer = TextDiffusion.from_pretrained(whole_sequence).tokenizer
    model, family = build_model(config, tokenizer, torch.device("cpu"))
    source = TextDiffusion.from_pretrained(whole_sequence).model
    assert family.block_size == 8
    assert source.config.diffusion["block_size"] is None
    for (name, mine), (_, its) in zip(
        model.state_dict().items(), source.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, its), name
    assert prepare_corpus(config.data, config.tokenizer, 0).tokenizer.get_vocab() == (
        tokenizer.get_vocab()
    )


def test_a_run_in_blocks_goes_on_from_a_whole_sequence_model(folder, whole_sequence, run):
    found = train(folder, "tuned", f"--train.init-from={whole_sequence}", "--train.steps=1")
    first = train(folder, "fresh", "--train.steps=1")
    assert found[0]["loss"] < first[0]["loss"] - 0.1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model.num-heads=1",), "the model section: its num_attention_heads is 2, not 1"),
        (("--model.norm=rmsnorm",), "the model section: its norm is layernorm, not rmsnorm"),
        (("--model.hidden-size=32",), "the model section: its hidden_size is 16, not 32"),
        (
            ("--tokenizer", '{"kind": "byte"}'),
            "the tokenizer:",
        ),
    ],
)
def test_weights_that_mean_something_else_are_refused(
    folder, whole_sequence, flags, reason, capsys
):
    words = [f"--train.init-from={whole_sequence}", f"--run.dir={folder / 'no'}", *flags]
    assert main(["train", str(folder / "c.yaml"), *words]) == 2
    said = capsys.readouterr().err
    assert f"{whole_sequence} does not fit {reason}" in said
    assert "Traceback" not in said


def test_ids_of_equal_number_but_other_meaning_are_refused(folder, whole_sequence, capsys):
    """The shapes fit, so only the tokens tell."""
    other = folder / "other.txt"
    other.write_text((folder / "corpus.txt").read_text().replace("R", "Q"))
    words = [f"--data.sources.0.source={other}", f"--run.dir={folder / 'no'}"]
    assert main(["train", str(folder / "c.yaml"), *words, f"--train.init-from={whole_sequence}"])
    assert "the tokenizer: 1 ids stand for other tokens" in capsys.readouterr().err
