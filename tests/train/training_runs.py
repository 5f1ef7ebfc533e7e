"""Runs of the real command, in one process or several."""

import json
import sys
from pathlib import Path

import pytest
from children import finished

from textdiff.cli import main

LAUNCH = ("-m", "accelerate.commands.launch", "--config_file")

CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2}}
train: {{steps: 50, global_batch_size: 8, micro_batch_size: 8, warmup_steps: 2, log_every: 1,
         mixed_precision: fp32, checkpoint_every: 25}}
evaluate: {{every: 50}}
sample: {{num_samples: 0}}
"""


class Runs:
    """A folder of runs of one small config: 50 steps of 8 rows in float32, without dropout.

    Args:
        folder: where the runs go.
        root: the repository.
    """

    def __init__(self, folder: Path, root: Path):
        self.folder = folder
        self.root = root
        corpus = folder / "corpus.txt"
        corpus.write_text("".join(f"Line {i} of {i * i} is here.\n" for i in range(400)))
        (folder / "c.yaml").write_text(CONFIG.format(corpus=corpus, folder=folder))

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def train(self, name: str, *flags: str) -> list[dict]:
        """Trains run `name` in one process, this one; returns the lines of its metrics."""
        assert main(["train", str(self / "c.yaml"), f"--run.dir={self / name}", *flags]) == 0
        return self.metrics(name)

    def launch(self, name: str, file: str, *flags: str) -> list[dict]:
        """Trains in two processes by `configs/accelerate/FILE.yaml`."""
        config = str(self.root / "configs" / "accelerate" / f"{file}.yaml")
        return self.start(name, [*LAUNCH, config, "-m", "textdiff", "train"], flags)

    def launch_sharded(self, name: str, file: str, *flags: str) -> list[dict]:
        """The same for a file that shards, which accelerate alone would not do on a CPU."""
        config = str(self.root / "configs" / "accelerate" / f"{file}.yaml")
        program = str(Path(__file__).with_name("sharded_run.py"))
        return self.start(name, [*LAUNCH, config, program], flags)

    def start(self, name: str, words: list[str], flags: tuple[str, ...]) -> list[dict]:
        done = finished(
            [sys.executable, *words, self / "c.yaml", f"--run.dir={self / name}", *flags]
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return self.metrics(name)

    def metrics(self, name: str) -> list[dict]:
        lines = (self / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def assert_same_curve(found: list[dict], expected: list[dict], rel: float = 2e-5) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for one, other in zip(found, expected, strict=True):
        for key in ("loss", "grad_norm", "bound_nats"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=rel), (other["step"], key)
