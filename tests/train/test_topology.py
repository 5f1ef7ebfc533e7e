"""Loss curves do not depend on accumulation, processes or data-loader workers: 2 x 4 = 1 x 8."""

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from training_runs import assert_same_curve

FILES = ("cpu", "ddp", "fsdp2", "zero2", "zero3", "hsdp")


def test_accumulation(runs, single):
    assert_same_curve(runs.train("accumulated", "--train.micro-batch-size=4"), single)
    assert len([line for line in single if "loss" in line]) == 50


def test_workers_change_nothing_at_all(runs, single):
    found = runs.train("workers", "--data.num-workers=2")
    assert [line.get("loss") for line in found] == [line.get("loss") for line in single]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("file", ["cpu", "ddp"])
def test_two_processes(runs, single, file):
    found = runs.launch(file, file, "--train.micro-batch-size=4")
    assert_same_curve(found, single)
    assert json.loads((runs / file / "env.json").read_text())["processes"] == 2


def test_blocks_and_adaln_train_too(runs):
    flags = ("--diffusion.block-size=8", "--model.adaln=true", "--model.time-conditioning=true")
    found = runs.train("blocks", *flags, "--train.learning-rate=0.01", "--train.steps=30")
    losses = [line["loss"] for line in found if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("name", FILES)
def test_accelerate_takes_every_file(root, name):
    path = root / "configs" / "accelerate" / f"{name}.yaml"
    load_config_from_file(str(path))  # refuses keys it does not know
    words = ["--config_file", str(path), "-m", "textdiff", "train", "CONFIG"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert arguments.num_processes == (4 if name == "hsdp" else 2)
    mesh = (
        arguments.parallelism_config_dp_replicate_size,
        arguments.parallelism_config_dp_shard_size,
    )
    assert mesh == ((2, 2) if name == "hsdp" else (1, 1))
    assert arguments.multi_gpu == (name in ("cpu", "ddp"))
    assert arguments.use_fsdp == (name not in ("cpu", "ddp"))
    header = path.read_text().split("\n\n")[0]
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in header
    assert "CPU" in header


def test_files_that_shard_differ_in_one_setting(root):
    found = [
        load_config_from_file(str(root / "configs" / "accelerate" / f"{name}.yaml")).fsdp_config
        for name in ("fsdp2", "zero3", "hsdp", "zero2")
    ]
    assert found[0] == found[1] == found[2] == {**found[3], "fsdp_reshard_after_forward": True}
    assert found[3]["fsdp_reshard_after_forward"] is False
