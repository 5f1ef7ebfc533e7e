"""Runs of networks that read their own prediction: split, resumed, sharded, exported, continued."""

import json
import shutil

import pytest
from refusals import refused
from safetensors.torch import load_file, save_file
from training_runs import assert_same_curve

from textdiff import TextDiffusion
from textdiff.cli import main
from textdiff.config.reading import validate
from textdiff.errors import CheckpointError, ConfigError
from textdiff.planning.sizes import run_sizes
from textdiff.train.measure import TIMED

FLAGS = ["--model.self-conditioning=true", "--train.steps=12", "--evaluate.every=12"]
FLAGS += ["--train.checkpoint-every=6", "--train.learning-rate=0.01"]


@pytest.fixture(scope="module")
def whole(runs) -> list[dict]:
    """The curve of one process: 1 x 8."""
    return runs.train("whole", *FLAGS)


def exactly(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def test_accumulation_changes_nothing(runs, whole):
    assert_same_curve(runs.train("in-parts", *FLAGS, "--train.micro-batch-size=2"), whole)


def test_recomputed_blocks_change_nothing(runs, whole):
    flags = [*FLAGS, "--model.gradient-checkpointing=true"]
    assert_same_curve(runs.train("recomputed", *flags), whole)


def test_half_of_the_rows_in_bfloat16_with_dropout_in_blocks(runs, whole):
    flags = [*FLAGS, "--train.mixed-precision=bf16", "--model.dropout=0.1"]
    found = runs.train("narrow", *flags, "--diffusion.block-size=8", "--train.compile=false")
    assert found[-1]["bound_nats"] < found[0]["loss"]
    assert found[0]["loss"] != whole[0]["loss"]


def test_resumption_is_exact(runs, whole):
    shutil.copytree(runs / "whole", runs / "resumed-alone")
    shutil.rmtree(runs / "resumed-alone" / "checkpoints" / "step-000012")
    shutil.rmtree(runs / "resumed-alone" / "export")
    assert exactly(runs.train("resumed-alone", *FLAGS)) == exactly(whole)
    exports = [runs / name / "export/model.safetensors" for name in ("whole", "resumed-alone")]
    assert exports[0].read_bytes() == exports[1].read_bytes()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("file", ["ddp", "fsdp2"])
def test_two_processes(runs, whole, file):
    """A row of each in a micro-batch: often neither has a first prediction, or one has."""
    launch = runs.launch if file == "ddp" else runs.launch_sharded
    found = launch(f"two-{file}", file, *FLAGS, "--train.micro-batch-size=1")
    assert_same_curve(found, whole)


def test_exports_say_what_they_need(runs, whole, tmp_path):
    export = runs / "whole" / "export"
    assert json.loads((export / "config.json").read_text())["self_conditioning"] is True
    model = TextDiffusion.from_pretrained(export).model
    assert model.self_conditioning.mlp[2].weight.any()  # it was trained
    broken = tmp_path / "export"
    shutil.copytree(export, broken)
    weights = load_file(broken / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("self_conditioning.")}
    assert len(weights) - len(kept) == 5
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    with refused(CheckpointError, None, "missing keys: self_conditioning."):
        TextDiffusion.from_pretrained(broken)


def test_a_network_without_it_learns_it(runs, whole, capsys):
    """New parameters start as a no-op; a trained second input is not dropped silently."""
    plain = runs.train("plain", "--train.steps=4", "--evaluate.every=4")
    assert "self_conditioning" not in (runs / "plain/export/config.json").read_text()
    still = [*FLAGS[:1], "--train.steps=1", "--evaluate.every=1", "--train.learning-rate=1e-30"]
    found = runs.train("goes-on", *still, f"--train.init-from={runs / 'plain' / 'export'}")
    assert found[-1]["bound_nats"] == pytest.approx(plain[-1]["bound_nats"], rel=1e-6)
    words = [str(runs / "c.yaml"), f"--train.init-from={runs / 'whole' / 'export'}"]
    capsys.readouterr()
    assert main(["train", *words, f"--run.dir={runs / 'drops'}"]) == 2
    assert "set self_conditioning" in capsys.readouterr().err
    words = [words[0], f"--train.init-from={runs / 'plain' / 'export'}", *FLAGS]
    assert main(["train", *words, f"--run.dir={runs / 'drops'}", "--train.lora", "{rank: 2}"]) == 2
    assert "its new layers would stay zero" in capsys.readouterr().err


def test_other_networks_refuse_it():
    model = {"kind": "transformers", "path": "x", "self_conditioning": True}
    with refused(ConfigError, None, "self_conditioning needs kind: textdiff"):
        validate({"model": model, "tokenizer": {"kind": "byte"}})


def test_a_plan_counts_the_first_pass():
    """Half of a forward pass of the blocks, and the head twice at half of the scored positions."""
    raw = {"model": {"hidden_size": 64, "num_layers": 3}, "data": {"sequence_length": 64}}
    off, on = (
        run_sizes(validate(raw | {"model": raw["model"] | {"self_conditioning": s}}), 100, False)
        for s in (False, True)
    )
    assert on.counts.total - off.counts.total == 64 + 2 * (64 * 64 + 64)
    head, mlp, scored = 2 * 64 * 100, 2 * 2 * 64 * 64, 65 / 128
    blocks = off.flops.model / 3 - scored * head
    more = 0.5 * blocks + 0.5 * scored * (2 * head + 3 * mlp)
    assert on.flops.model - off.flops.model == pytest.approx(more, rel=1e-12)
