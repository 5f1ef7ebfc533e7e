"""Loss curves do not depend on accumulation, processes or data-loader workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: 10, global_batch_size: 8, micro_batch_size: 8, warmup_steps: 2, log_every: 1,
         mixed_precision: fp32}}
evaluate: {{every: 10}}
sample: {{num_samples: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("topology")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i} of {i * i} is here.\n" for i in range(400)))
    (folder / "c.yaml").write_text(CONFIG.format(corpus=corpus, folder=folder))
    return folder


def curve(folder: Path, name: str, *flags: str, launcher: tuple[str, ...] = ()) -> list[dict]:
    words = [sys.executable, *launcher, "-m", "textdiff", "train", str(folder / "c.yaml")]
    done = subprocess.run(
        [*words, f"--run.dir={folder / name}", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def single(folder) -> list[dict]:
    return curve(folder, "single")


def assert_same_curve(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "bound_nats"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=2e-5), (other["step"], key)


def test_accumulation(folder, single):
    assert_same_curve(curve(folder, "accumulated", "--train.micro-batch-size=4"), single)


def test_workers_change_nothing_at_all(folder, single):
    found = curve(folder, "workers", "--data.num-workers=2")
    assert [line.get("loss") for line in found] == [line.get("loss") for line in single]


def test_two_processes(folder, single):
    # --multi_gpu is accelerate's word for "start processes"; without a GPU they speak gloo.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2")
    launcher += ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    found = curve(folder, "two", "--train.micro-batch-size=4", launcher=launcher)
    assert_same_curve(found, single)
    assert json.loads((folder / "two" / "env.json").read_text())["processes"] == 2


def test_blocks_and_adaln_train_too(folder):
    flags = ("--diffusion.block-size=8", "--model.adaln=true", "--model.time-conditioning=true")
    found = curve(folder, "blocks", *flags, "--train.learning-rate=0.01", "--train.steps=30")
    losses = [line["loss"] for line in found if "loss" in line]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
