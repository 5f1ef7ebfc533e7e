"""Learning rate, optimizers, averages, metrics, checkpoints: each against its definition."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from textdiff.config import TrainConfig
from textdiff.errors import CheckpointError
from textdiff.train.checkpoint import Checkpoint, checkpoints, damage
from textdiff.train.optim import (
    build_optimizers,
    lr_multiplier,
    resolve_precision,
    set_learning_rate,
)
from textdiff.train.reporter import MetricsFile
from textdiff.train.run_state import EMA


def rates(**options) -> list[float]:
    config = TrainConfig(**({"steps": 100, "warmup_steps": 10} | options))
    return [lr_multiplier(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "trapezoidal"])
def test_warmup_is_linear_and_reaches_the_peak(schedule):
    found = rates(lr_schedule=schedule)
    assert found[:10] == [(step + 1) / 10 for step in range(10)]
    assert max(found) == 1.0


def test_schedules_by_their_formula():
    assert set(rates(lr_schedule="constant")[10:]) == {1.0}
    cosine = rates(lr_schedule="cosine")
    assert cosine[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine[99] < 0.001
    trapezoidal = rates(lr_schedule="trapezoidal", decay_fraction=0.4)
    assert set(trapezoidal[10:61]) == {1.0}
    assert trapezoidal[80] == pytest.approx(0.5)
    assert trapezoidal[99] == pytest.approx(1 / 40)


def network() -> nn.Module:
    from textdiff.models import TextDiffusionConfig, TextDiffusionModel

    config = TextDiffusionConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, adaln=True
    )
    return TextDiffusionModel(config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_optimised_once_and_only_matrices_decay(optimizer):
    model = network()
    built = build_optimizers(model, TrainConfig(optimizer=optimizer, weight_decay=0.1))
    seen = [p for o in built for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, seen)) == sorted(map(id, model.parameters()))
    for group in (group for o in built for group in o.param_groups):
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_muon_takes_the_matrices_of_the_blocks():
    model = network()
    _, muon = build_optimizers(model, TrainConfig(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in muon.param_groups[0]["params"]} == {
        "blocks.0.attn_qkv.weight",
        "blocks.0.attn_out.weight",
        "blocks.0.mlp.0.weight",
        "blocks.0.mlp.2.weight",
    }


def test_learning_rates_keep_their_proportion():
    built = build_optimizers(
        network(), TrainConfig(optimizer="muon", learning_rate=0.002, muon_learning_rate=0.05)
    )
    set_learning_rate(built, 0.5)
    assert {group["lr"] for group in built[0].param_groups} == {0.001}
    assert built[1].param_groups[0]["lr"] == 0.025


def test_average_follows_its_recursion():
    model = nn.Linear(3, 2)
    average = EMA(model, 0.9)
    expected = model.weight.detach().clone()
    for n in range(1, 150):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.state_dict()["weight"], expected)


def test_average_is_put_in_and_taken_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    average = EMA(model, 0.9)
    with torch.no_grad():
        model[0].weight.zero_()
    with average.applied(model):
        assert model[0].weight.abs().sum() > 0
        assert not model[1].training
    assert model[0].weight.abs().sum() == 0
    assert model[1].training


def test_no_average_is_the_weights_themselves():
    model = nn.Linear(2, 2)
    average = EMA(model, 0.0)
    with torch.no_grad():
        model.weight.fill_(3.0)
    average.update(model)
    assert torch.equal(average.state_dict()["weight"], model.weight)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0, -1)
    for step in range(1, 7):
        metrics.write({"step": step, "loss": 0.1 + step})
    with path.open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    MetricsFile(path, 4, -1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    MetricsFile(path, 0, -1)
    assert path.read_text() == ""


def save(root, step, keep=2):
    state = {"step": step}
    weights = {"w": torch.full((3,), float(step))}
    return Checkpoint(weights, weights, [{"state": {}}], state).save(root, keep)


def test_checkpoints_rotate_and_round_trip(tmp_path):
    for step in (5, 10, 200):
        path = save(tmp_path, step)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000010", "step-000200"]
    loaded = Checkpoint.load(path)
    assert loaded.model["w"].tolist() == [200.0] * 3
    assert loaded.state["step"] == 200


def test_million_step_checkpoints_stay_in_order(tmp_path):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    save(tmp_path, 1_000_001)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1000000", "step-1000001"]


def test_copies_beside_checkpoints_are_left_alone(tmp_path):
    shutil.copytree(save(tmp_path, 1, keep=1), tmp_path / "step-000001.bak")
    (tmp_path / "step-000009").write_text("a note")
    save(tmp_path, 2, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000002"]
    assert damage(tmp_path / "step-000001.bak") is None


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "ema.safetensors", "optimizer.pt", "trainer.json", "manifest.json"],
)
@pytest.mark.parametrize("how", ["removed", "shortened", "altered"])
def test_any_damage_is_found(tmp_path, name, how):
    path = save(tmp_path, 1)
    assert damage(path) is None
    file = path / name
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "shortened":
        file.write_bytes(content[:-2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert damage(path) is not None
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(path)
    assert error.value.code == "damaged"


@pytest.mark.parametrize("lost", ["files", "optimizer.pt", "all files", "all"])
def test_a_manifest_that_has_lost_entries_is_damage(tmp_path, lost):
    path = save(tmp_path, 1) / "manifest.json"
    content = json.loads(path.read_text())
    if lost == "files":
        del content["files"]
    elif lost == "all files":
        content["files"] = {}
    elif lost == "all":
        content = []
    else:
        del content["files"][lost]
    path.write_text(json.dumps(content))
    assert "its manifest.json has lost" in damage(path.parent)


@pytest.mark.parametrize(("written", "code"), [(99, "newer_format"), (1, "older_format")])
def test_other_formats_are_refused(tmp_path, monkeypatch, written, code):
    import textdiff.train.checkpoint as module

    monkeypatch.setattr(module, "FORMAT", written)
    path = save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(path)
    assert error.value.code == code


def test_an_interrupted_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    import textdiff.train.checkpoint as module

    save(tmp_path, 1)
    monkeypatch.setattr(
        module.torch,
        "save",
        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, 2)
    assert error.value.code == "cannot_write"
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000001"]
    assert damage(checkpoints(tmp_path)[0]) is None


def test_optimizer_files_hold_no_code(tmp_path):
    """A checkpoint with a pickled object is refused, not executed."""
    path = save(tmp_path, 1)
    torch.save([Checkpoint], path / "optimizer.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    import hashlib

    content = (path / "optimizer.pt").read_bytes()
    manifest["files"]["optimizer.pt"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as error:
        Checkpoint.load(path)
    assert error.value.code == "more_than_tensors"


def test_precision_names():
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("auto", torch.device("cpu")) in ("bf16", "fp32")
    assert resolve_precision("auto", torch.device("meta")) == "fp32"
