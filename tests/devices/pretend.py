"""A pretend accelerator: tensors of the CPU that report another device, and a watch over them.

Everything is computed on the CPU. The watch counts what a GPU would do beside computing: kernels
that are launched, waits of the CPU for the device, and copies from memory that is not pinned, which
wait too. Tensors of both devices in one operation are refused, as on a GPU. The device is called
`meta`: builds of torch for CPUs have no guard for any other. Where shapes are enough, tensors are
really there, and nothing is computed.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from recording import Graph
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten

# Their results have a size, or a number, that the CPU has to read.
READ = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
        "unique_consecutive", "equal", "is_nonzero", "repeat_interleave"}  # fmt: skip
QUIET = {"detach", "alias", "empty", "empty_strided", "empty_like", "new_empty", "lift_fresh",
         "new_empty_strided", "set_", "is_same_size"}  # fmt: skip
MAY_MIX = {"copy_", "_to_copy", "index", "index_put_", "index_put", "_index_put_impl_"}


class Pretend(Tensor):
    """A tensor with its numbers on the CPU, `held`, that reports a device."""

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device):
        self = Tensor._make_wrapper_subclass(
            cls, real.shape, dtype=real.dtype, strides=real.stride(),
            storage_offset=real.storage_offset(), device=device,
        )  # fmt: skip
        self.held = real
        return self

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"Pretend({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} runs outside the watch")


class Watch(TorchDispatchMode):
    """Counts what operations on a pretend device would do.

    Attributes:
        waits: why the CPU would wait for the device, with the line that asks.
        uploads: copies to the device from memory that is not pinned, likewise.
        launches: kernels.
        readbacks: for each copy that the CPU waited for, kernels queued meanwhile.
        idle: whether the device has always finished what was queued.
        graphs: those that were recorded, of `Graph`.
    """

    def __init__(self, shapes_only: bool):
        super().__init__()
        self.device, self.shapes_only = torch.device("meta"), shapes_only
        self.waits: list[str] = []
        self.uploads: list[str] = []
        self.launches: list[str] = []
        self.readbacks: list[int] = []
        self.idle = False
        self.copies: list[tuple[Tensor, Tensor]] = []  # on their way to the CPU
        self.graph: Graph | None = None  # that is being recorded
        self.graphs: list[Graph] = []
        self.replayed: Graph | None = None  # last
        self.queued = 0  # kernels, those of replays too

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        there = [x for x in tensors if x.device.type == self.device.type]
        to = kwargs.get("device")
        to = None if to is None else torch.device(to)
        self._count(func, name, args, tensors, there, to)
        if there and _returns_later(name, args):
            self.copies.append((args[0], args[1].held.clone()))
            return args[0]
        if self.shapes_only:
            return func(*args, **kwargs)
        if self.graph is not None and (there or (to is not None and to.type == self.device.type)):
            result = self.graph.record(func, *_real(args, kwargs))
        else:
            result = self._run(func, args, kwargs)
        if kwargs.get("pin_memory"):
            result.pretends_pinned = True
        moved = bool(there) if to is None else to.type == self.device.type
        if name == "_local_scalar_dense" or not moved:
            return result
        if func._schema.is_mutable and name.endswith("_"):
            return args[0] if func._schema.returns else None
        return pytree.tree_map_only(Tensor, self.put, result)

    def put(self, x: Tensor) -> Tensor:
        """Put a tensor on the pretend device."""
        return x if isinstance(x, Pretend) else Pretend(x, self.device)

    def _run(self, func, args, kwargs):
        with _disable_current_modes():
            args, kwargs = _real(args, kwargs)
            return func(*args, **kwargs)

    def _count(self, func, name, args, tensors, there, to):
        here = [x for x in tensors if x.device.type == "cpu" and x.ndim > 0]
        if there and here and name not in MAY_MIX:
            raise RuntimeError(f"{name} has tensors of two devices: {_where()}")
        if not there:
            if to is not None and to.type == self.device.type and name == "_to_copy":
                self._upload(args[0])
            return
        if not func.is_view and name not in QUIET and not _is_view(func):
            self.launches.append(name)
            self.queued += 1
        if name in READ or (name == "_to_copy" and to is not None and to.type == "cpu"):
            self.waits.append(f"{name}: {_where()}")
        if name == "copy_" and args[0].device != args[1].device:
            if args[0].device.type == "cpu":
                if not _returns_later(name, args):
                    self.waits.append(f"copy_: {_where()}")
            elif args[1].ndim:
                self._upload(args[1])
        if name.startswith(("index", "_index")) and len(args) > 1 and isinstance(args[1], list):
            self._count_index(name, args)

    def _count_index(self, name, args):
        for index in args[1]:
            if index is None:
                continue
            if args[0].device.type == "cpu":
                raise RuntimeError(f"a tensor of the CPU has an index of the device: {_where()}")
            if index.device.type == "cpu":
                self._upload(index)
            one = len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1
            if index.dtype in (torch.bool, torch.uint8) and not one:
                self.waits.append(f"{name} by a mask: {_where()}")

    def _upload(self, x: Tensor) -> None:
        if not getattr(x, "pretends_pinned", False):
            self.uploads.append(_where())


def _real(args, kwargs):
    """Return arguments as the CPU computes with them."""
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    return pytree.tree_map_only(Pretend, lambda x: x.held, (args, kwargs))


def _returns_later(name: str, args) -> bool:
    """Return whether a copy to the CPU is one that the CPU does not wait for."""
    later = name == "copy_" and len(args) > 2 and args[2] and args[0].device.type == "cpu"
    return later and getattr(args[0], "pretends_pinned", False)


class Event:
    """The end of the copies that were queued before; until then their numbers are not there."""

    def __init__(self, watch: Watch):
        self.watch, self.copies = watch, watch.copies
        watch.copies = []

    def record(self, stream: None) -> None:
        self.queued, self.waits = self.watch.queued, len(self.watch.waits)

    def query(self) -> bool:
        if self.watch.idle:
            self._arrive()
        return self.watch.idle

    def synchronize(self) -> None:
        since = self.watch.queued - self.queued
        if self.copies and len(self.watch.waits) == self.waits:  # else it has waited for more
            self.watch.readbacks.append(since)
            if not since:
                self.watch.waits.append(f"event: {_where()}")
        self._arrive()

    def _arrive(self) -> None:
        with _disable_current_modes():
            for here, numbers in self.copies:
                here.copy_(numbers)
        self.copies = []


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def _where() -> str:
    """Return the innermost line of textdiff on the stack."""
    for frame in reversed(traceback.extract_stack()):
        if "/textdiff/" in frame.filename:
            return f"{frame.filename.rpartition('/textdiff/')[2]}:{frame.lineno} {frame.line}"
    return "elsewhere"


def _pinned(x: Tensor, *_: Any) -> Tensor:
    if getattr(x, "pretends_pinned", False):
        return x
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise RuntimeError(f"an expanded tensor cannot be pinned: {_where()}")
    x = x.clone()
    x.pretends_pinned = True
    return x


@contextmanager
def pretending(shapes_only: bool = False) -> Iterator[Watch]:
    """Watch operations on the pretend device while entered."""
    known = torch.is_autocast_enabled

    def autocast(device: str = "cpu") -> bool:
        return device != "meta" and known(device)  # torch has none there, and raises

    with (
        mock.patch.object(Tensor, "pin_memory", _pinned),
        mock.patch.object(torch, "is_autocast_enabled", autocast),
        Watch(shapes_only) as watch,
        mock.patch.object(torch, "Event", side_effect=lambda device: Event(watch)),
        mock.patch.object(torch.accelerator, "current_stream", return_value=None),
    ):
        yield watch


def moved(module: nn.Module, watch: Watch) -> nn.Module:
    """Move a module's parameters and buffers to the pretend device, in place."""
    new: dict[int, Tensor] = {}
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, old in group.items():
                if old is None:
                    continue
                if id(old) not in new:
                    there = watch.put(old.detach().clone())
                    is_weight = isinstance(old, nn.Parameter)
                    new[id(old)] = nn.Parameter(there, old.requires_grad) if is_weight else there
                group[name] = new[id(old)]
    return module
