"""Checkpoints of sharded weights: resharding, writing in the background, damage, failures."""

import errno
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from forked_ranks import in_ranks
from refusals import refused
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from textdiff import cli
from textdiff.cli import main
from textdiff.errors import CheckpointError
from textdiff.train import run_state, shard_files
from textdiff.train.background_save import ShardedSaver
from textdiff.train.checkpoint import (
    Checkpoint,
    checkpoints,
    damage,
    is_sharded_checkpoint,
    newest_usable,
    read_state,
)
from textdiff.train.distributed import full_tensor, load_optimizer, load_tensors
from textdiff.train.optim import Muon
from textdiff.train.shard_files import load_shards
from textdiff.train.trainer import Trainer

pytestmark = pytest.mark.dist

CONFIG = """
data: {{sources: [{{source: {folder}/corpus.txt}}], sequence_length: 32,
       cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: 12, global_batch_size: 4, micro_batch_size: 2, warmup_steps: 2, log_every: 1,
         checkpoint_every: 4, mixed_precision: fp32}}
evaluate: {{every: 12, max_documents: 1}}
sample: {{num_samples: 0}}
"""


class State:
    """A tiny network with averages, AdamW and Muon, sharded over a mesh or not at all.

    Its tensors have more and fewer rows than there are processes.
    """

    def __init__(self, mesh: tuple[int, ...] | None, seed: int):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))
        if mesh is not None:
            names = ("copies", "shards")[-len(mesh) :]
            fully_shard(self.model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
        matrix = self.model[1].weight
        rest = [p for p in self.model.parameters() if p is not matrix]
        self.optimizers = [torch.optim.AdamW(rest, fused=True), Muon([matrix], 0.02, 0.0)]
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def step(self) -> None:
        """Takes a step from rows that are the same in every process."""
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
        self.model(x).square().sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, p in self.model.named_parameters():
            self.ema[name].lerp_(p.detach(), 0.3)

    def checkpoint(self, step: int) -> Checkpoint:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        return Checkpoint(parameters, self.ema, states, {"step": step})

    def load(self, path: Path) -> None:
        load_shards(path, dict(self.model.named_parameters()), self.ema, self.optimizers)

    def whole(self) -> dict[str, np.ndarray]:
        """Copies of all tensors, gathered."""
        named = shard_files.named_tensors(self.checkpoint(0))
        return {name: full_tensor(tensor).numpy().copy() for name, tensor in named.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """To the last bit."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].tobytes() == tensor.tobytes(), name


def together(mesh: tuple[int, ...], work) -> list:
    """The result of each process of a mesh."""
    processes = int(torch.tensor(mesh).prod())
    return in_ranks(processes, lambda rank: work(PartialState(cpu=True), mesh), seconds=100)


def nothing() -> None:
    """Stands for an export."""


# --- resharding ----------------------------------------------------------------------------------


def begin(root: Path, state: PartialState, mesh) -> dict[str, np.ndarray]:
    """Trains two steps, saves, and trains on while that is written."""
    training, writer = State(mesh, seed=0), ShardedSaver(root, 2, state)
    training.step()
    training.step()
    kept = training.whole()
    writer.save(training.checkpoint(2), nothing)
    training.step()
    writer.settle()
    assert (training.whole()["model.0.weight"] != kept["model.0.weight"]).all()
    return kept


def pass_on(root: Path, state: PartialState, mesh) -> dict[str, np.ndarray]:
    """Loads the newest checkpoint into other weights and saves it as the next one."""
    training, writer = State(mesh, seed=1), ShardedSaver(root, 2, state)
    path = checkpoints(root)[-1]
    step = read_state(path)["step"] + 1
    training.load(path)
    writer.save(training.checkpoint(step), nothing)
    writer.settle()
    return training.whole()


def test_resharding_changes_no_bit(tmp_path):
    """One process, two, four, two groups of two copies, one, and none that shards."""
    [expected] = together((1,), partial(begin, tmp_path))
    kinds = {name.rpartition(".")[2] for name in expected if name.startswith("optimizer.")}
    assert kinds == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer"}
    for mesh in ((2,), (4,), (2, 2), (1,)):
        for tensors in together(mesh, partial(pass_on, tmp_path)):
            assert_equal(tensors, expected)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000005", "step-000006"]
    alone = State(None, seed=2)
    alone.load(checkpoints(tmp_path)[0])
    assert_equal(alone.whole(), expected)
    assert alone.optimizers[0].param_groups[0]["betas"] == (0.9, 0.999)


def take_over(root: Path, state: PartialState, mesh) -> dict[str, np.ndarray]:
    """Loads a whole checkpoint into sharded weights."""
    training, whole = State(mesh, seed=1), Checkpoint.load(checkpoints(root)[-1])
    load_tensors(dict(training.model.named_parameters()), whole.model)
    load_tensors(training.ema, whole.ema)
    for optimizer, saved in zip(training.optimizers, whole.optimizers, strict=True):
        load_optimizer(optimizer, saved)
    return training.whole()


# --- writing in the background -------------------------------------------------------------------


@contextmanager
def writes(action) -> Iterator[None]:
    """Shards are written after something else."""
    write = shard_files.TensorShard.write

    def slow(shard, path):
        action(path)
        write(shard, path)

    shard_files.TensorShard.write = slow
    try:
        yield
    finally:
        shard_files.TensorShard.write = write


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def saves(root: Path, state: PartialState, mesh) -> list:
    """The fate of four checkpoints; the process ends while the last is written."""
    training, writer, heard = State(mesh, seed=0), ShardedSaver(root, 2, state), []
    training.step()
    whole = take_over(root / "whole", state, mesh)
    go = threading.Event()

    def note() -> None:
        """Neither process goes on before both have looked."""
        dist.barrier()
        heard.append(names(root))
        dist.barrier()

    with writes(lambda path: go.wait(30)):
        writer.save(training.checkpoint(1), nothing)  # returns while the threads have not begun
        writer.poll()
        note()
        go.set()
        while writer.pending:
            writer.poll()
        note()
    with writes(lambda path: refuse() if state.process_index == 1 else None):
        writer.save(training.checkpoint(2), nothing)
        try:
            while True:
                writer.poll()
        except CheckpointError as error:
            heard.append((error.code, str(error)))
        note()
    writer.save(training.checkpoint(3), nothing)
    try:
        with writer.outlasting_errors():
            raise ValueError("of a step")
    except ValueError:
        note()
    with writes(lambda path: threading.Event().wait(30)):
        writer.save(training.checkpoint(4), nothing)
        dist.barrier()
        return [heard, training.whole(), whole]


def refuse() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, list, State]:
    """The folder after `saves`, what its processes noted, and a whole checkpoint's content."""
    root, alone = tmp_path_factory.mktemp("saved"), State(None, seed=4)
    alone.step()
    alone.checkpoint(1).save(root / "whole", 1)
    return root, together((2,), partial(saves, root)), alone


def test_training_goes_on_while_a_thread_writes(saved):
    root, [(heard, expected, whole), (others, *_)], alone = saved
    begun, written, failed, after, error = heard
    assert heard == others
    assert begun == [".partial-step-000001", "whole"]
    assert written == ["step-000001", "whole"]
    code, sentence = failed
    assert code == "cannot_write"
    assert f"cannot write {root / 'step-000002'}: No space left on device; the newest" in sentence
    assert after == written
    assert error == ["step-000001", "step-000003", "whole"]
    # Both processes ended while the fourth was written.
    assert names(root) == [".partial-step-000004", *error]
    newest = checkpoints(root)[-1]
    assert damage(newest) is None
    assert names(newest) == [
        "manifest.json",
        "optimizers.json",
        "shard-00001-of-00002.safetensors",
        "shard-00002-of-00002.safetensors",
        "trainer.json",
    ]
    into = State(None, seed=5)
    into.load(newest)
    assert_equal(into.whole(), expected)
    assert_equal(whole, alone.whole())


# --- damage --------------------------------------------------------------------------------------


def change(path: Path, what: str) -> None:
    """Damages a checkpoint in some way."""
    shard, manifest = path / "shard-00002-of-00002.safetensors", path / "manifest.json"
    content, record = bytearray(shard.read_bytes()), json.loads(manifest.read_text())
    if what == "missing":
        shard.unlink()
    elif what == "shortened":
        shard.write_bytes(content[:-2])
    elif what == "altered":
        content[-1] ^= 1
        shard.write_bytes(content)
    elif what == "one more":
        shutil.copy(shard, path / "shard-00003-of-00003.safetensors")
    elif what == "one less":
        shard.unlink()
        del record["files"][shard.name]
    else:
        record["shards"] = 3
    manifest.write_text(json.dumps(record))


DAMAGE = ("missing", "shortened", "altered", "one more", "one less", "another number")


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_noticed_before_anything_is_loaded(saved, tmp_path, what):
    root, *_ = saved
    shutil.copytree(root / "step-000001", tmp_path / "step-000001")
    shutil.copytree(root / "step-000003", tmp_path / "step-000003")
    change(tmp_path / "step-000003", what)
    said = []
    # As two processes do, each of which hashes half of the files.
    usable = newest_usable(
        checkpoints(tmp_path),
        said.append,
        lambda path: damage(path, 0, 2) or damage(path, 1, 2),
    )
    assert usable == tmp_path / "step-000001"
    assert len(said) == 1
    with refused(CheckpointError, "damaged", "step-000003"):
        Checkpoint.load(tmp_path / "step-000003")
    with refused(CheckpointError, "all_damaged", "--resume never"):
        newest_usable([tmp_path / "step-000003"], said.append, damage)


def test_other_tensors_are_refused(saved):
    root, *_ = saved
    other = State(None, seed=0)
    other.model.append(nn.Linear(3, 3))
    before = other.whole()
    with refused(CheckpointError, "other_tensors", "step-000003"):
        other.load(root / "step-000003")
    assert_equal(other.whole(), before)


# --- a run that saves in the background ----------------------------------------------------------


def train(folder: Path, name: str) -> int:
    return main(["train", str(folder / "c.yaml"), f"--run.dir={folder / name}"])


def outcome(run: Path) -> tuple[list[dict], bytes]:
    """The figures that must agree bit for bit, and the weights."""
    figures = ("step", "loss", "learning_rate", "grad_norm", "tokens", "bound_nats")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: line[name] for name in figures if name in line} for line in lines]
    return kept, (run / "export" / "model.safetensors").read_bytes()


def disturbed(folder: Path, state: PartialState, mesh) -> list:
    """Runs of one process that save as if their weights were sharded."""
    run_state.is_sharded = lambda network: True
    cli._leave_others = lambda code: None
    step, stopped = Trainer._step, folder / "stopped" / "checkpoints"

    def interrupted(trainer, *arguments):
        result = step(trainer, *arguments)
        if trainer.progress.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Trainer._step = interrupted
    with writes(lambda path: time.sleep(0.3)):
        heard = [train(folder, "stopped"), names(stopped)]
    Trainer._step = step
    heard += [
        train(folder, "stopped"),
        names(stopped),
        is_sharded_checkpoint(stopped / "step-000012"),
    ]
    with (
        redirect_stderr(StringIO()) as shown,
        writes(lambda path: refuse() if "step-000008" in str(path) else None),
    ):
        heard += [train(folder, "full")]
    return [*heard, shown.getvalue()]


def test_signals_and_full_disks_change_no_bit(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(f"Line {i} of {i * i}.\n" for i in range(300)))
    (tmp_path / "c.yaml").write_text(CONFIG.format(folder=tmp_path))
    assert train(tmp_path, "whole") == 0
    [heard] = together((1,), partial(disturbed, tmp_path))
    assert heard[:5] == [
        143,
        ["step-000004", "step-000006"],  # though the thread was slow
        0,
        ["step-000008", "step-000012"],
        True,
    ]
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
    code, shown = heard[5:]
    assert code == 1
    assert "step-000008: No space left on device; the newest checkpoint is" in shown
    assert "step-000004; make room" in shown
    lines, _ = outcome(tmp_path / "full")
    assert lines[-1]["step"] < 12
    assert damage(tmp_path / "full" / "checkpoints" / "step-000004") is None
