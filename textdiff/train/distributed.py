"""The processes of a run: what they do together, and weights that are spread over them (FSDP2).

A sharded tensor is a `DTensor`. Validation, samples and exports see whole tensors, and each shard
of a checkpoint is read on any number of processes. So nothing of it depends on the sharding, and a
run may be continued on another number of processes. Gathering is a collective: every process calls
it, in the same order.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    broadcast_object_list,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from textdiff.config import Config
from textdiff.config.lora import LoraConfig
from textdiff.errors import ConfigError, LostProcessError, TextDiffError
from textdiff.export.adapters import add_adapters, trained_rows
from textdiff.export.loading import cpu_only
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.train.engines import check_engine, check_mesh
from textdiff.train.optim import resolve_precision
from textdiff.train.trackers import check_trackers

T = TypeVar("T")

# How long a process waits for the others. Longer than whatever the first process does alone: it
# prepares the corpus, draws samples and writes checkpoints. A process that dies is noticed at once.
TIMEOUT = timedelta(minutes=30)

# How gloo and NCCL say that an exchange failed; most of it arrives as a bare RuntimeError.
_SIGNS = ("gloo", "Connection closed by peer", "Connection reset", "pair closure", "NCCL")

_GUARD = 'put what the script does under `if __name__ == "__main__":`'


def is_sharded(module: nn.Module) -> bool:
    """Return whether a module's parameters are spread over processes."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, on this process's device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copy whole tensors to the CPU, one by one, which may be sharded here.

    Args:
        tensors: by name.
        keep: whether this process needs the result; others get an empty one.
    """
    copies = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=not isinstance(tensor, DTensor))
    return copies


def _shard_like(value: Any, like: Tensor) -> Any:
    """Shard a whole tensor as another one; each process holds all of it, so nothing is sent."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_tensors(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into tensors that may be sharded, by name."""
    for name, target in targets.items():
        target.copy_(_shard_like(state[name], target))


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state dict of whole tensors; its parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        index: {key: _shard_like(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})


def meta_copy(model: Denoiser, lora: LoraConfig | None = None) -> Denoiser:
    """Return the same network without storage for its parameters, for `materialized`.

    Args:
        model: the network.
        lora: section of its adapters; None: it has none.
    """
    with torch.device("meta"):
        copy = type(model)(model.config)
        if lora is not None:
            add_adapters(copy, lora, trained_rows(model))
    if isinstance(model, TransformersDenoiser) and isinstance(copy, TransformersDenoiser):
        # Its config names our attention function instead.
        copy.attn_implementation = model.attn_implementation
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).requires_grad_(parameter.requires_grad)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        copy.get_submodule(owner)._buffers[leaf] = buffer.detach().clone()
    copy.eval()
    return copy


@contextmanager
def materialized(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a `meta_copy` whole weights while entered."""
    _put(model, {name: full_tensor(value) for name, value in state.items()})
    try:
        yield
    finally:
        _put(model, {name: p.detach().to("meta") for name, p in model.named_parameters()})


def _put(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Replace parameters by name; those that modules share stay shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    for name, old in list(model.named_parameters()):
        new = nn.Parameter(state[name], requires_grad=old.requires_grad)
        for module, leaf in places[id(old)]:
            module._parameters[leaf] = new


def refuse_reimport() -> None:
    """End a worker that has come here because it imports the script that started it.

    Raises:
        ConfigError: with the guard that the script lacks.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(
            f"a worker process imports this script, which would train again: {_GUARD}"
        )


def guard_hint() -> str:
    """Return the end of a sentence about a worker that ended, where workers import the script."""
    return "" if multiprocessing.get_start_method() == "fork" else f"; in a script, {_GUARD}"


def on_main(state: Accelerator | PartialState, action: Callable[[], T]) -> T:
    """Run an action on the main process alone; every process gets its result, or its error.

    Args:
        state: the processes.
        action: its result can be pickled.

    Raises:
        TextDiffError: what the action raised.
    """
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = action()
        except TextDiffError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


class Vote:
    """Vote of the processes by the largest number, exchanged between CPUs.

    The vote has a gloo group of its own: it waits for no device, and a process that died breaks
    it at once, which NCCL would not notice before its timeout.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if several else None

    def largest(self, value: int) -> int:
        """Return the largest value of all processes, the same on each of them."""
        if self._group is None:
            return value
        ballot = torch.tensor(value)
        dist.all_reduce(ballot, op=dist.ReduceOp.MAX, group=self._group)
        return int(ballot)


@contextmanager
def report_lost_process(state: Accelerator | PartialState) -> Iterator[None]:
    """Report an exchange that fails because another process is gone.

    Raises:
        LostProcessError: in place of that failure.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
        if state.num_processes == 1 or not lost:
            raise
        timed_out = "Timed out" in str(error) or "timeout" in str(error)
        what = "did not answer in time" if timed_out else "ended unexpectedly"
        raise LostProcessError(
            f"process {state.process_index} of {state.num_processes} stops: another process {what} "
            "(its own output says why, or the system killed it for memory); start the same command "
            "again to continue from the last checkpoint"
        ) from error


def make_accelerator(config: Config) -> Accelerator:
    """Return an Accelerator for the config's precision and accumulation.

    Raises:
        ConfigError: the processes do not divide the global batch, the engine or the mesh is not
            supported, a worker imports the script, or a tracker is not installed.
    """
    refuse_reimport()
    check_trackers(config)
    check_engine(config)
    probe = PartialState(cpu=cpu_only(), timeout=TIMEOUT)
    probe.wait_for_everyone()  # one that fails at once must not end before all have connected
    check_mesh(probe.num_processes, cpu_only())
    # Accelerate keeps one state per Python process; a second run may want another precision.
    AcceleratorState._reset_state()
    GradientState._reset_state()
    rows, size = config.train.global_batch_size, config.train.micro_batch_size
    accumulation, left = divmod(rows, size * probe.num_processes)
    if left or not accumulation:
        raise ConfigError(
            f"train.global_batch_size {rows} cannot be split over {probe.num_processes} processes "
            f"with train.micro_batch_size {size}: it has to be a multiple of {probe.num_processes} "
            f"x {size} = {size * probe.num_processes}",
            code="uneven_batch",
        )
    precision = resolve_precision(config.train.mixed_precision, probe.device)
    # Given as plugins, neither is read from what accelerate's file says in the environment.
    return Accelerator(
        cpu=cpu_only(),
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
        dynamo_plugin=TorchDynamoPlugin(backend="no"),
    )
