"""FSDP2 under gloo: a sharded run is the unsharded one, and so is all that it leaves behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from training_runs import assert_same_curve

from textdiff.train.checkpoint import checkpoints, is_sharded_checkpoint
from textdiff.train.distributed import gather, load_tensors
from textdiff.train.measure import TIMED
from textdiff.train.shard_files import fill_tensors

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def sharded(runs) -> list[dict]:
    """The curve of 2 x 2 rows with accumulation 2."""
    return runs.launch_sharded("sharded", "fsdp2", "--train.micro-batch-size=2")


def tensors(folder) -> dict[str, torch.Tensor]:
    """Export, and weights, averages and optimizer state of the last checkpoint."""
    last = max((folder / "checkpoints").glob("step-*"))
    found = {f"export {k}": v for k, v in load_file(folder / "export/model.safetensors").items()}
    if is_sharded_checkpoint(last):
        reader = HuggingFaceStorageReader(str(last))
        content = reader.read_metadata()
        shards = {k: torch.empty(v.size) for k, v in content.state_dict_metadata.items()}
        fill_tensors(shards, reader, content)
        found |= {name_in_whole(name): value for name, value in shards.items()}
        return dict(sorted(found.items()))
    for name in ("model", "ema"):
        found |= {f"{name} {k}": v for k, v in load_file(last / f"{name}.safetensors").items()}
    for number, states in enumerate(torch.load(last / "optimizer.pt", weights_only=True)):
        for index, state in states["state"].items():
            found |= {f"{number} {index} {key}": value for key, value in state.items()}
    return dict(sorted(found.items()))


def name_in_whole(name: str) -> str:
    """As `tensors` calls a tensor that shards hold."""
    kind, _, rest = name.partition(".")
    return " ".join(rest.split(".")) if kind == "optimizer" else f"{kind} {rest}"


@pytest.mark.slow
def test_sharded_training_is_training(runs, single, sharded):
    assert json.loads((runs / "sharded" / "env.json").read_text())["sharded"] is True
    assert_same_curve(sharded, single)


@pytest.mark.slow
def test_what_is_written_is_whole(runs, single, sharded):
    found, expected = tensors(runs / "sharded"), tensors(runs / "single")
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    files = [
        {path.name for path in (runs / name / "export").iterdir()} for name in ("sharded", "single")
    ]
    assert files[0] == files[1]


def interrupted(runs, name: str) -> None:
    """Run `name` as the sharded one was when it was killed after step 25."""
    shutil.copytree(runs / "sharded", runs / name)
    shutil.rmtree(runs / name / "checkpoints" / "step-000050")
    shutil.rmtree(runs / name / "export")


@pytest.mark.slow
def test_resumption_is_exact(runs, sharded):
    interrupted(runs, "resumed")
    found = runs.launch_sharded("resumed", "fsdp2", "--train.micro-batch-size=2")
    for line in (*found, *sharded):
        for name in TIMED:
            line.pop(name, None)
    assert found == sharded
    found, expected = tensors(runs / "resumed"), tensors(runs / "sharded")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_an_unsharded_run_goes_on_in_shards(runs, single):
    shutil.copytree(runs / "single", runs / "spread")
    shutil.rmtree(runs / "spread" / "checkpoints" / "step-000050")
    found = runs.launch_sharded("spread", "fsdp2", "--train.micro-batch-size=2")
    assert_same_curve(found, single)
    formats = [is_sharded_checkpoint(path) for path in checkpoints(runs / "spread" / "checkpoints")]
    assert formats == [False, True]


@pytest.mark.slow
def test_a_sharded_run_goes_on_in_one_process(runs, single, sharded):
    interrupted(runs, "alone")
    found = runs.train("alone")
    assert_same_curve(found, single)
    assert json.loads((runs / "alone" / "env.json").read_text())["sharded"] is False


# Muon orthogonalises in bfloat16 where it can, so rounding of a sum over processes shows there:
# without sharding, two processes differ from one in weights by 0.010, with it by 0.012.
VARIANTS = {
    "muon": ("fsdp2", 1e-3, ["--train.optimizer=muon"]),
    "blocks": (
        "zero2",
        2e-5,
        ["--diffusion.block-size=8", "--model.adaln=true", "--train.sync-each-batch=false"],
    ),
    "learned": (
        "zero3",
        2e-5,
        ["--diffusion.schedule", '{"kind": "learned"}', "--diffusion.noise.draw=time"],
    ),
    "bf16": ("fsdp2", 5e-3, ["--train.mixed-precision=bf16"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(runs, name):
    file, rel, flags = VARIANTS[name]
    flags = [*flags, "--train.steps=12", "--evaluate.every=12"]
    expected = runs.train(f"{name}-single", *flags)
    found = runs.launch_sharded(f"{name}-sharded", file, *flags, "--train.micro-batch-size=2")
    assert_same_curve(found, expected, rel)
    assert json.loads((runs / f"{name}-sharded" / "env.json").read_text())["sharded"] is True


@pytest.mark.slow
def test_copies_of_shards(runs):
    """HSDP, 2 x 2 processes with accumulation 2."""
    flags = ["--train.steps=8", "--evaluate.every=8", "--train.checkpoint-every=8"]
    expected = runs.train("hsdp-single", *flags)
    found = runs.launch_sharded("hsdp", "hsdp", *flags, "--train.micro-batch-size=1")
    assert_same_curve(found, expected)
    assert json.loads((runs / "hsdp" / "env.json").read_text())["processes"] == 4
    weights = tensors(runs / "hsdp")
    for name, tensor in tensors(runs / "hsdp-single").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_whole_tensors_are_copied():
    tensors = {"x": torch.arange(3.0)}
    copies = gather(tensors, keep=True)
    tensors["x"].zero_()
    assert copies["x"].tolist() == [0, 1, 2]
    assert gather(tensors, keep=False) == {}
    load_tensors(tensors, copies)
    assert tensors["x"].tolist() == [0, 1, 2]
