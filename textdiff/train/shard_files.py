"""Shards of a training checkpoint: one safetensors file per process, read on any number of them.

torch.distributed.checkpoint plans which process writes which part of a tensor, and which parts a
process reads. What it writes itself holds pickles. Here each process writes a safetensors file
whose header has the offsets of its parts, which torch's `HuggingFaceStorageReader` reads.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.optim import Optimizer

from textdiff.errors import CheckpointError, first_line
from textdiff.train.checkpoint import GROUPS, Checkpoint


def shard_name(process: int, processes: int) -> str:
    """Return the name of a process's file of tensors."""
    return f"shard-{process + 1:05d}-of-{processes:05d}.safetensors"


@dataclass(frozen=True)
class TensorShard:
    """Parts of tensors that one process writes, on the CPU.

    Attributes:
        tensors: the parts by the names of the tensors.
        offsets: where each part begins in its tensor.
        copied: event after which the copies are complete; None: they are.
    """

    tensors: dict[str, Tensor]
    offsets: dict[str, list[int]]
    copied: torch.cuda.Event | None

    def write(self, path: Path) -> None:
        """Write a file that `HuggingFaceStorageReader` of torch reads."""
        if self.copied is not None:
            self.copied.synchronize()
        offsets = {name: {"saved_offsets": offset} for name, offset in self.offsets.items()}
        header = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(self.tensors, path, metadata=header)


class ShardPlan:
    """Division of tensors among processes, planned again only where their names change.

    A part that several processes hold is written by one of them.

    Args:
        group: the processes, by their CPUs.
    """

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self._names: list[str] = []
        self._items: list[WriteItem] = []

    def copy(self, tensors: dict[str, Tensor]) -> TensorShard:
        """Copy what this process writes to the CPU, which waits for no device here."""
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(tensors, is_coordinator=dist.get_rank(self._group) == 0)
        self._plan(planner, list(tensors))
        local = {item.index.fqn: planner.resolve_data(item) for item in self._items}
        tensors = {name: value for name, value in local.items() if isinstance(value, Tensor)}
        offsets = {item.index.fqn: list(item.index.offset or ()) for item in self._items}
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        on_device = any(tensor.device.type == "cuda" for tensor in tensors.values())
        copied = torch.cuda.current_stream().record_event() if on_device else None
        return TensorShard(copies, offsets, copied)

    def _plan(self, planner: DefaultSavePlanner, names: list[str]) -> None:
        changed = torch.tensor(int(names != self._names))
        dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=self._group)
        if not changed:
            return
        plans: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(plans, planner.create_local_plan(), group=self._group)
        plans, _ = planner.create_global_plan(plans)
        items = planner.finish_plan(plans[dist.get_rank(self._group)]).items
        self._items = [item for item in items if _elements(item)]
        self._names = names


def _elements(item: WriteItem) -> int:
    """Return the number of elements of a part; 0 where a tensor has fewer rows than processes."""
    if item.tensor_data is None or item.tensor_data.chunk is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")  # it would be pickled
    return math.prod(item.tensor_data.chunk.sizes)


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, from a GPU into pinned memory and without waiting."""
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return copy.copy_(tensor.detach(), non_blocking=pinned)


def named_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return weights, averages and optimizer state by the names that shards have for them."""
    return {
        **{f"model.{name}": tensor for name, tensor in checkpoint.model.items()},
        **{f"ema.{name}": tensor for name, tensor in checkpoint.ema.items()},
        **{
            f"optimizer.{number}.{index}.{key}": value
            for number, optimizer in enumerate(checkpoint.optimizers)
            for index, entry in optimizer["state"].items()
            for key, value in entry.items()
        },
    }


def write_groups(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the settings of the optimizers' groups, which are not tensors."""
    groups = [optimizer["param_groups"] for optimizer in checkpoint.optimizers]
    (folder / GROUPS).write_text(json.dumps(groups, indent=2) + "\n")


@torch.no_grad()
def load_shards(
    folder: Path,
    parameters: Mapping[str, Tensor],
    averages: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
) -> None:
    """Read a sharded checkpoint, of which each process reads the parts of its own shards.

    Args:
        folder: the checkpoint, which `damage` has passed.
        parameters: receive the weights, by name; sharded or not.
        averages: receive the averages.
        optimizers: receive their state.

    Raises:
        CheckpointError: it holds other tensors than these.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        groups = json.loads((folder / GROUPS).read_text())
        metadata = reader.read_metadata()
        states = [_empty_state(f"optimizer.{n}.", o, metadata) for n, o in enumerate(optimizers)]
        weights = {name: parameter.detach() for name, parameter in parameters.items()}
        fill_tensors(
            named_tensors(Checkpoint(weights, dict(averages), states, {})), reader, metadata
        )
    except (RuntimeError, ValueError, LookupError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not hold the tensors of this run ({first_line(error)}); "
            "continue it with the config and the version that wrote it",
            code="other_tensors",
        ) from error
    for optimizer, state, saved in zip(optimizers, states, groups, strict=True):
        optimizer.load_state_dict({**state, "param_groups": [_tuples(group) for group in saved]})


def fill_tensors(
    tensors: dict[str, Tensor], reader: HuggingFaceStorageReader, metadata: Metadata
) -> None:
    """Read the parts of tensors that this process holds."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.create_local_plan(), planner).wait()


def _empty_state(prefix: str, optimizer: Optimizer, metadata: Metadata) -> dict[str, Any]:
    """Return an optimizer's state as saved, still without values; sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, saved in metadata.state_dict_metadata.items():
        if not name.startswith(prefix) or not isinstance(saved, TensorStorageMetadata):
            continue
        index, key = name.removeprefix(prefix).split(".")
        like, dtype = parameters[int(index)], saved.properties.dtype
        same = saved.size == like.shape
        state.setdefault(int(index), {})[key] = (
            torch.empty_like(like, dtype=dtype) if same else torch.empty(saved.size, dtype=dtype)
        )
    return {"state": dict(sorted(state.items()))}


def _tuples(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group's settings with tuples, for which JSON has lists."""
    return {
        key: tuple(value) if isinstance(value, list) and key != "params" else value
        for key, value in group.items()
    }
