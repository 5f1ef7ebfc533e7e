"""Weights that are spread over processes (FSDP2): gathering them, and spreading them again.

A sharded tensor is a `DTensor`. Everything that leaves the training step (validation, samples,
checkpoints, exports) sees whole tensors, so that none of it depends on how a run was spread, and a
run may be continued on another number of processes. Gathering is a collective: every process calls
it, in the same order.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from textdiff.errors import ConfigError
from textdiff.models import TextDiffusionModel


def check_engine(accelerator: Accelerator) -> None:
    """Refuses the ways to shard that training cannot continue exactly, and sets up the one it can.

    FSDP2 gets float32 shards under autocast, as in a run of one process: its own low precision
    would round the loss, and the gradients of the head between chunks of positions.

    Raises:
        ConfigError: DeepSpeed, Megatron or the first version of FSDP.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        return
    reasons = {
        DistributedType.DEEPSPEED: "DeepSpeed keeps weights and optimizer state in buffers and "
        "pickles of its own, which averages, clipping and exact resumption cannot reach",
        DistributedType.MEGATRON_LM: "Megatron-LM brings a training loop of its own",
        DistributedType.FSDP: "the first version of FSDP flattens parameters, which the optimizer "
        "groups tell apart",
    }
    if kind in reasons:
        raise ConfigError(
            f"{reasons[kind]}; launch with configs/accelerate/fsdp2.yaml, or with zero2.yaml or "
            "zero3.yaml beside it, which shard the same state through FSDP2"
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether a module's parameters are spread over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on this process's device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(state: Any, keep: bool) -> Any:
    """A nest of dicts and lists with whole tensors; sharded ones move to the CPU one by one.

    Args:
        state: tensors and other values.
        keep: whether this process wants the result; elsewhere sharded tensors become empty.
    """
    if isinstance(state, Mapping):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gather(value, keep) for value in state]
    if not isinstance(state, DTensor):
        return state
    full = state.full_tensor()
    return full.cpu() if keep else full.new_empty(0)


def _spread(value: Any, like: Tensor) -> Any:
    """A whole tensor, cut as another one is; every process holds all of it, so nothing is sent."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_tensors(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies whole tensors into tensors that may be sharded, by name."""
    for name, target in targets.items():
        target.copy_(_spread(state[name], target))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state dict of whole tensors; its parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {key: _spread(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})


def hollow(model: TextDiffusionModel) -> TextDiffusionModel:
    """The same network without weights, to be `filled` with gathered ones."""
    with torch.device("meta"):
        copy = TextDiffusionModel(model.config)
    copy.eval()
    return copy


@contextmanager
def filled(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a `hollow` network whole weights and takes them out again."""
    model.load_state_dict({name: whole(value) for name, value in state.items()}, assign=True)
    try:
        yield
    finally:
        model.to("meta")
