"""Kill a training run again and again, and compare its result with an uninterrupted run.

One run is not interrupted. Another one, of the same config, is started and killed with SIGKILL at
random moments: while it starts, while it trains, while a checkpoint or an export is being written.
After the last kill it may finish. Both must then agree, bit for bit, in every line of
`metrics.jsonl` (all fields but the speed) and in the exported weights.

    python tests/manual/kill_loop.py --kills 20 --output kill_loop.json

Without `--config` it trains a tiny model on a corpus of its own, over several epochs, with two
data-loader workers, dropout, and a checkpoint every few steps.

With several processes (on this machine, over gloo) a kill hits one of them or all of them, and the
ones that are left must end by themselves, once they have met. `--sharded` spreads weights and
states over them, and checkpoints are written in the background. Exit code 0: equal; 1: not.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from textdiff.commands.flags import parse_verb
from textdiff.train.measure import TIMED

SHARDED = Path(__file__).resolve().parents[1] / "train" / "sharded_run.py"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
MOMENTS = ("starting", "training", "saving")
UNRELATED = set(TIMED)
PATIENCE_SECONDS = 120.0  # for processes that have lost another one to end


TINY = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 32, num_workers: 2}}
tokenizer: {{kind: byte}}
model: {{hidden_size: 64, num_layers: 2, num_heads: 2, dropout: 0.1}}
train: {{steps: 600, global_batch_size: 8, micro_batch_size: 2, learning_rate: 3.0e-4,
         warmup_steps: 20, log_every: 3, checkpoint_every: 5, mixed_precision: fp32}}
evaluate: {{every: 40}}
sample: {{num_samples: 0}}
"""


@dataclass(frozen=True)
class Kill:
    """One kill and what it found.

    Attributes:
        moment: what was aimed at; `training` where a run ended before a save came.
        alive_seconds: from the start of the processes to the kill.
        victims: ranks that were killed; the others ended by themselves.
        last_step: step of the last complete line of metrics.
        left: folders that were being written.
        survivor: what a process said that had lost another.
    """

    moment: str
    alive_seconds: float
    victims: list[int]
    last_step: int
    left: list[str]
    survivor: str


class Run:
    """The processes of one training run, in sessions of their own; none outlives a `with` block.

    Args:
        words: arguments of `textdiff train`.
        directory: the run's.
        processes: how many.
        sharded: whether weights and states are spread over them, by FSDP2.
    """

    def __init__(self, words: list[str], directory: Path, processes: int, sharded: bool = False):
        self.directory = directory
        program = [str(SHARDED)] if sharded else ["-m", "textdiff", "train"]
        command = [sys.executable, *program, *words, f"--run.dir={directory}"]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        common |= FSDP if sharded else {}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.started = time.monotonic()
        self.log = (directory.parent / f"{directory.name}.log").open("a+", encoding="utf-8")
        self.log_start = self.log.seek(0, os.SEEK_END)
        self.ranks = []
        for rank in range(processes):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            place = {key: str(value) for key, value in numbers.items()} | address
            self.ranks.append(
                subprocess.Popen(
                    command,
                    env={**common, **(place if processes > 1 else {})},
                    stdout=self.log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for rank in self.ranks:
            rank.kill()  # nothing, where it has ended
            rank.wait()
        self.log.close()

    @property
    def alive_seconds(self) -> float:
        """Since the processes were started."""
        return time.monotonic() - self.started

    def ended(self) -> bool:
        """Whether a process has ended."""
        return any(rank.poll() is not None for rank in self.ranks)

    def output(self) -> str:
        """What these processes have said."""
        return Path(self.log.name).read_bytes()[self.log_start :].decode()

    def training(self) -> bool:
        """Whether the run is set up."""
        return f"run {self.directory}:" in self.output()

    def saving(self) -> list[str]:
        """Folders that are being written."""
        folders = (self.directory, self.directory / "checkpoints")
        names = [path.name for folder in folders for path in folder.glob(".*-*")]
        return sorted(name for name in names if name.startswith((".partial-", ".old-")))

    def kill(self, victims: list[int]) -> None:
        """SIGKILL for some, then the end of all.

        Processes that have not met yet wait for each other as long as a slow start may take;
        whoever launches them ends the others when one is gone, and so does this.
        """
        met = self.training()
        for victim in victims if met else range(len(self.ranks)):
            self.ranks[victim].send_signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.wait(PATIENCE_SECONDS)

    def finish(self) -> None:
        """Waits for the end of the run; once one process has ended, the others are about to."""
        while not self.ended():
            time.sleep(0.05)
        codes = [rank.wait(PATIENCE_SECONDS) for rank in self.ranks]
        if any(codes):
            sys.exit(f"a run that was left alone ended with {codes}:\n{self.output()[-2000:]}")


def tiny_config(folder: Path) -> Path:
    """Writes a small corpus and the config of a tiny model."""
    lines = (f"Line {i} of {i * i} is here.\n" for i in range(400))
    (folder / "corpus.txt").write_text("".join(lines))
    path = folder / "config.yaml"
    path.write_text(TINY.format(corpus=folder / "corpus.txt"))
    return path


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(run: Run, moment: str, chance: random.Random) -> str:
    """Returns at a random point of a moment; what it really was."""
    if moment == "starting":
        time.sleep(chance.uniform(0.0, 8.0))
        return "training" if run.training() else moment
    while not run.training() and not run.ended():
        time.sleep(0.05)
    if moment == "training":
        time.sleep(chance.uniform(0.0, 4.0))
        return moment
    saves = chance.randint(1, 4)
    while not run.ended():
        if run.saving():
            saves -= 1
            if saves == 0:
                time.sleep(chance.uniform(0.0, 0.03))
                return moment
            while run.saving() and not run.ended():
                time.sleep(0.001)
        time.sleep(0.001)
    return "training"


def last_step(directory: Path) -> int:
    """The newest step in a run's metrics."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}\n")]
    return max(steps, default=0)


def outcome(directory: Path) -> tuple[list[dict[str, Any]], str]:
    """The fields of a run that must agree, and the hash of its exported weights."""
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    named = [{k: v for k, v in line.items() if k not in UNRELATED} for line in lines]
    weights = (directory / "export" / "model.safetensors").read_bytes()
    return named, hashlib.sha256(weights).hexdigest()


def killed(start: Callable[[], Run], processes: int, chance: random.Random) -> Kill | None:
    """Starts or continues a run and kills it; None if it ended before."""
    with start() as run:
        moment = wait_for(run, chance.choice(MOMENTS), chance)
        if run.ended():
            run.finish()
            return None
        everyone = list(range(processes))
        victims = chance.choice([everyone, *([rank] for rank in everyone)])
        seconds = run.alive_seconds
        run.kill(victims)
    said = [line for line in run.output().splitlines() if "another process" in line]
    return Kill(
        moment=moment,
        alive_seconds=round(seconds, 2),
        victims=victims,
        last_step=last_step(run.directory),
        left=run.saving(),
        survivor=said[0] if said else "",
    )


def main(
    *,
    config: Path | None = None,
    override: tuple[str, ...] = (),
    kills: int = 20,
    seed: int = 0,
    processes: int = 1,
    sharded: bool = False,
    folder: Path = Path("runs/kill_loop"),
    output: Path | None = None,
) -> int:
    """Compares a run that is killed again and again with one that is not.

    Args:
        config: of the run; checkpoints should be frequent, or it never gets on. None: a tiny one.
        override: values of the config, as `train.steps=400`.
        kills: how often to kill.
        seed: of the moments and victims.
        processes: of the run, on this machine.
        sharded: whether several processes share weights and states, by FSDP2.
        folder: where both runs are written; emptied first.
        output: a JSON file for the log and the verdict.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pairs = [value.partition("=") for value in override]
    values = [f"--{key.replace('_', '-')}={value}" for key, _, value in pairs]
    words = [str(config or tiny_config(folder)), f"--data.cache-dir={folder / 'cache'}", *values]
    start = partial(Run, words, processes=processes, sharded=sharded)
    with start(folder / "alone") as alone:
        alone.finish()
        print(f"uninterrupted: {last_step(folder / 'alone')} steps, {alone.alive_seconds:.1f} s")
    chance, log = random.Random(seed), []
    while len(log) < kills:
        kill = killed(partial(start, folder / "killed"), processes, chance)
        if kill is None:
            print(f"the run ended after {len(log)} kills; give it more steps")
            break
        log.append(kill)
        left = f", left {' '.join(kill.left)}" if kill.left else ""
        print(
            f"kill {len(log)}: {kill.moment}, ranks {kill.victims}, {kill.alive_seconds} s, "
            f"at step {kill.last_step}{left}",
            flush=True,
        )
    with start(folder / "killed") as last:
        last.finish()
    (expected, expected_weights), (found, found_weights) = (
        outcome(folder / name) for name in ("alone", "killed")
    )
    equal = found == expected and found_weights == expected_weights
    verdict = {
        "command": ["python", "tests/manual/kill_loop.py", *sys.argv[1:]],
        "processes": processes,
        "kills": len(log),
        "kills_during_a_save": sum(bool(kill.left) for kill in log),
        "lines_compared": len(expected),
        "fields": sorted({key for line in expected for key in line}),
        "metrics_equal": found == expected,
        "weights_equal": found_weights == expected_weights,
        "environment": json.loads((folder / "killed" / "env.json").read_text()),
        "log": [asdict(kill) for kill in log],
    }
    if output is not None:
        output.write_text(json.dumps(verdict, indent=2) + "\n")
    print(f"{len(expected)} lines of metrics and the weights are {'' if equal else 'NOT '}equal")
    return 0 if equal and len(log) == kills else 1


if __name__ == "__main__":
    sys.exit(parse_verb(main, "kill_loop.py", sys.argv[1:])())
