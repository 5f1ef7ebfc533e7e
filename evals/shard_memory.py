"""Peak memory of a training step per process: unsharded, and sharded in two ways.

    python evals/shard_memory.py

Two processes under gloo, AdamW, two steps of two micro-batches each. Counted are the bytes of all
tensors of 16 KiB and more that are alive after an operation, so neither the allocator nor the
library's own memory counts. `held_mb` is what is left between steps: weights and moments. MB are
10^6 bytes.

| way | weights |
|---|---|
| `unsharded` | whole in every process; gradients are averaged over processes once per step |
| `blocks alone` | accelerate's preparation: one group per block, one for the rest, autocast |
| `groups` | `textdiff.train.sharding`: blocks in bfloat16, embedding and head by themselves |

`once per step` leaves gradients whole until the step's last micro-batch, as accelerate does
(`train.sync_each_batch: false`).
"""

import argparse
import json
import os
import tempfile
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import ByCount, NoiseUniforms, draw_noise
from textdiff.diffusion.process import Vocabulary
from textdiff.loss import Batch, DenoisingLoss, corrupt, training_sum
from textdiff.models import TextDiffusionConfig, TextDiffusionModel
from textdiff.train.sharding import shard

PROCESSES, STEPS, MICRO_BATCHES = 2, 2, 2
HIDDEN, LAYERS, HEADS, LENGTH, ROWS, VOCABULARY = 512, 8, 8, 128, 1, 32768
SMALLEST = 2**14  # bytes of a tensor that counts
WAYS = ("unsharded", "blocks alone", "groups", "groups, once per step")


def build() -> DenoisingLoss:
    """Return the loss of a masked model with random weights."""
    torch.manual_seed(0)
    config = TextDiffusionConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        mask_token_id=0,
    )
    family = build_family(
        {
            "process": "absorbing",
            "schedule": {"kind": "loglinear"},
            "objective": {"kind": "mdlm"},
            "block_size": None,
        },
        Vocabulary.of(VOCABULARY, 0, ()),
    )
    return DenoisingLoss(TextDiffusionModel(config), family)


def batch_of(loss: DenoisingLoss, seed: int) -> Batch:
    """Return rows of random tokens, masked."""
    draw = torch.Generator().manual_seed(seed)
    x0 = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=draw)
    u = torch.rand(ROWS, LENGTH, generator=draw, dtype=torch.float64)
    v = torch.full((ROWS, 1), 0.5, dtype=torch.float64)
    noise = draw_noise(loss.family, x0, NoiseUniforms(v, u), ByCount())
    return corrupt(loss.family, x0, noise, None)


def divided(way: str, loss: DenoisingLoss, half: bool) -> nn.Module:
    """Return the module to train in one of `WAYS`."""
    if way == "unsharded":
        return loss
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    plugin.mixed_precision_policy = None
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16" if half else "no",
        device=torch.device("cpu"),
        parallelism_config=None,
        num_processes=PROCESSES,
        is_main_process=False,
    )
    if way == "blocks alone":
        del loss.head_sum  # the head belongs to the rest
        loss.head_sum = SimpleNamespace(of=training_sum)
        return fsdp2_prepare_model(accelerator, loss)
    shard(loss, accelerator)
    return loss


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are alive, and their peak."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        self.note(list(module.parameters()))

    def note(self, tensors: object) -> None:
        for leaf in tree_leaves(tensors):
            # Shapes of sharded results are inferred from tensors without storage.
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
                local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
                storage = local.untyped_storage()
                if storage.nbytes() >= SMALLEST and id(storage) not in self.storages:
                    gone = partial(self._gone, id(storage))
                    self.storages[id(storage)] = weakref.ref(storage, gone)

    def _gone(self, key: int, _: object) -> None:
        self.storages.pop(key, None)

    @property
    def bytes(self) -> int:
        alive = [reference() for reference in list(self.storages.values())]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # until it has become an operation on the shards
        result = function(*args, **(kwargs or {}))
        self.note(result)
        self.peak = max(self.peak, self.bytes)
        return result


def measure(rank: int, way: str, precision: str) -> dict[str, float]:
    """Train for `STEPS` and return the peak, and what is left between steps."""
    half, loss = precision == "bf16", build()
    module = divided(way, loss, half)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    with LiveBytes(module) as live:
        for step in range(STEPS):
            for micro_step in range(MICRO_BATCHES):
                if way in ("blocks alone", "groups, once per step"):
                    module.set_requires_gradient_sync(micro_step + 1 == MICRO_BATCHES)
                batch = batch_of(loss, 100 * step + 10 * micro_step + rank)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    total, _ = module(batch)
                total.backward()
            if way == "unsharded":
                for p in module.parameters():
                    dist.all_reduce(p.grad)
                    p.grad /= PROCESSES
            optimizer.step()
            optimizer.zero_grad()
            del total, batch
        return {"peak_mb": live.peak / 1e6, "held_mb": live.bytes / 1e6}


def member(rank: int, way: str, precision: str, folder: str) -> None:
    """Measure in one of the processes and write what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = measure(rank, way, precision)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def row(way: str, precision: str) -> dict:
    """Measure one way in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(member, (way, precision, folder), nprocs=PROCESSES)
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    peak, held = (max(each[key] for each in found) for key in ("peak_mb", "held_mb"))
    print(f"{way:24}{precision:6}{peak:9.1f} MB at most{held:9.1f} MB between steps", flush=True)
    return {"way": way, "precision": precision, "peak_mb": peak, "held_mb": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "results" / "shard_memory.json"
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()
    rows = [row(way, precision) for precision in ("fp32", "bf16") for way in WAYS]
    from speed import origin

    parameters = sum(p.numel() for p in build().parameters())
    result = {
        "command": "python evals/shard_memory.py",
        "seed": 0,
        **origin(),
        "processes": PROCESSES,
        "parameters": parameters,
        "parameters_mb": 4 * parameters / 1e6,
        "size": {
            "hidden": HIDDEN,
            "layers": LAYERS,
            "heads": HEADS,
            "length": LENGTH,
            "rows": ROWS,
            "vocabulary": VOCABULARY,
        },
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
