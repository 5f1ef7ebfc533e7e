"""Time and memory of a checkpoint of sharded weights: whole through one process, or in shards.

    python evals/checkpoint_time.py [--rows ROW ...] [--output evals/results/checkpoint_time.json]

Two processes over gloo, FSDP2, 24 matrices of 2048 x 2048 (100.7 million parameters), AdamW and
averages: 16 bytes per parameter. `whole` gathers every tensor and writes in the main process while
the others wait. `sharded` copies to the CPU and writes in the background. Exports are not written,
but what sharded training waits for them is measured: the averages are gathered in the main process.

| figure | meaning |
|---|---|
| `waits_seconds` | training stands still: medians over the saves |
| `export_waits_seconds` | it stands still for an export besides |
| `complete_seconds` | from the begin of a save until it is on the disk |
| `step_seconds`, `step_while_writing_seconds` | a training step alone, and beside the threads |
| `peak_gib` | peak resident memory of the main process from the first save on, or of a resumption |
| `over_training_gib` | that, above the peak of a training step |

Every row is a pair of fresh processes. The folder is deleted between rows and at the end.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WIDTH, MATRICES, PROCESSES, SAVES, SEED = 2048, 24, 2, 3, 0
GIB = 2**30


class Training:
    """A sharded stack of matrices with AdamW's state and averages."""

    def __init__(self):
        import torch
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(SEED)
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MATRICES)))
        mesh = init_device_mesh("cpu", (PROCESSES,))
        for layer in self.model:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def step(self) -> float:
        """Take a step on one row; returns seconds."""
        import torch

        begin = time.perf_counter()
        self.model(torch.ones(1, WIDTH)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - begin

    def checkpoint(self, step: int):
        """Return the state at a step, sharded."""
        from textdiff.train.checkpoint import Checkpoint

        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        return Checkpoint(parameters, self.ema, [self.optimizer.state_dict()], {"step": step})


def peak() -> int:
    """Return the peak of resident bytes since `restart_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [size] = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(size)


def restart_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def gathered(checkpoint, keep: bool):
    """Return the same with whole tensors, in the process that keeps them."""
    from textdiff.train.checkpoint import Checkpoint
    from textdiff.train.distributed import gather

    [optimizer] = checkpoint.optimizers
    entries = {index: gather(entry, keep) for index, entry in optimizer["state"].items()}
    return Checkpoint(
        gather(checkpoint.model, keep),
        gather(checkpoint.ema, keep),
        [{**optimizer, "state": entries}],
        checkpoint.state,
    )


def saving(root: Path, sharded: bool, state) -> dict[str, float]:
    """Save several times; returns the figures of this process."""
    import torch.distributed as dist

    from textdiff.train.background_save import CheckpointSaver, ShardedSaver

    training = Training()
    training.step()
    restart_peak()
    alone = statistics.median(training.step() for _ in range(SAVES))
    trained = peak()
    saver = (ShardedSaver if sharded else CheckpointSaver)(root, 1, state)
    waits, complete, beside = [], [], []
    for number in range(1, SAVES + 1):
        dist.barrier()
        begin = time.perf_counter()
        checkpoint = training.checkpoint(number)
        if not sharded:
            checkpoint = gathered(checkpoint, state.is_main_process)
        saver.save(checkpoint, lambda: None)
        del checkpoint
        waits.append(time.perf_counter() - begin)
        if sharded:
            beside.append(training.step())
        saver.settle()
        complete.append(time.perf_counter() - begin)
    figures = {
        "waits_seconds": statistics.median(waits),
        "complete_seconds": statistics.median(complete),
        "step_seconds": alone,
        **({"step_while_writing_seconds": statistics.median(beside)} if beside else {}),
        "peak_gib": peak() / GIB,
        "over_training_gib": (peak() - trained) / GIB,
    }
    return {**figures, "export_waits_seconds": exporting(training, state)} if sharded else figures


def exporting(training: Training, state) -> float:
    """Return the median seconds of gathering averages, as `RunState.save` does for an export."""
    import torch.distributed as dist

    from textdiff.train.distributed import gather

    waits = []
    for _ in range(SAVES):
        dist.barrier()
        begin = time.perf_counter()
        gather(training.ema, keep=state.is_main_process)
        waits.append(time.perf_counter() - begin)
    return statistics.median(waits)


def resuming(root: Path, sharded: bool, state) -> dict[str, float]:
    """Check and load the newest checkpoint; returns the figures of this process."""
    import torch.distributed as dist

    from textdiff.train.checkpoint import Checkpoint, checkpoints, damage
    from textdiff.train.distributed import load_optimizer, load_tensors
    from textdiff.train.shard_files import load_shards

    training, path = Training(), checkpoints(root)[-1]
    parameters = dict(training.model.named_parameters())
    dist.barrier()
    restart_peak()
    before, begin = peak(), time.perf_counter()
    if sharded:
        assert damage(path, state.process_index, state.num_processes) is None
        load_shards(path, parameters, training.ema, [training.optimizer])
    else:
        assert not state.is_main_process or damage(path) is None
        dist.barrier()
        whole = Checkpoint.read(path)
        load_tensors(parameters, whole.model)
        load_tensors(training.ema, whole.ema)
        load_optimizer(training.optimizer, whole.optimizers[0])
    dist.barrier()
    seconds = time.perf_counter() - begin
    return {
        "waits_seconds": seconds,
        "peak_gib": peak() / GIB,
        "over_new_run_gib": (peak() - before) / GIB,
    }


ROWS: dict[str, tuple[Callable[..., dict[str, float]], bool]] = {
    "save whole": (saving, False),
    "resume whole": (resuming, False),
    "save sharded": (saving, True),
    "resume sharded": (resuming, True),
}


def member(name: str, root: Path) -> None:
    """Be one process of a pair; the main one prints its figures."""
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    work, sharded = ROWS[name]
    figures = work(root, sharded, state)
    if state.is_main_process:
        print(json.dumps({key: round(value, 3) for key, value in figures.items()}), flush=True)
    torch.distributed.barrier()
    os._exit(0)


def pair(name: str, root: Path) -> dict[str, float]:
    """Run one row in fresh processes; returns the figures of the main one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    words = [sys.executable, __file__, "--member", name, "--root", str(root)]
    processes = []
    for rank in map(str, range(PROCESSES)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **address, **place}
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return json.loads(printed[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--member", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        member(arguments.member, arguments.root)
    from speed import origin

    record = {
        "command": shlex.join(["python", "evals/checkpoint_time.py", "--rows", *arguments.rows]),
        **origin(),
        "cpus": os.cpu_count(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "seed": SEED,
        "processes": PROCESSES,
        "parameters": MATRICES * WIDTH**2,
        "rows": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.rows:
            record["rows"][name] = pair(name, Path(folder) / name.split()[1])
            print(name, record["rows"][name])
    record["load_after"] = [round(load, 2) for load in os.getloadavg()]
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
