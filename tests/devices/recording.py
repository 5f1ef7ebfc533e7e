"""Recorded kernels on the pretend accelerator, under the names that torch has for CUDA graphs.

While recording nothing is computed, as on a GPU: what the kernels would have written is spoiled
afterwards. A replay computes from what is in their memory then. Graphs share memory: it spoils what
the last one left. A wait, or numbers that the CPU hands over, cannot be recorded: they would be
those of the recording for ever.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

NOT_KERNELS = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")


class Graph:
    """Kernels in their order, with the memory that each reads and writes.

    Attributes:
        replays: how often they were launched.
        kernels: how many there are.
    """

    def __init__(self, watch):
        self.watch, self.steps, self.changed = watch, [], []
        self.replays = self.kernels = 0
        watch.graphs.append(self)

    def begin(self) -> None:
        watch = self.watch
        self.before = len(watch.waits), len(watch.uploads), len(watch.launches)
        watch.graph = self

    def end(self) -> None:
        watch = self.watch
        watch.graph = None
        waits, uploads, launches = self.before
        self.kernels = len(watch.launches) - launches
        del watch.launches[launches:]
        with _disable_current_modes():
            for memory, before in reversed(self.changed):
                memory.copy_(before)
            self.spoil()
        if refused := watch.waits[waits:] + watch.uploads[uploads:]:
            raise RuntimeError(f"not permitted when the stream is capturing: {refused}")

    def record(self, func, args, kwargs):
        """Take an operation down; return memory for its result, of the right shape."""
        name = func.overloadpacket.__name__
        tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
        with _disable_current_modes():
            if func._schema.is_mutable:
                self.changed += [(x, x.clone()) for x in tensors]
            result = func(*args, **kwargs)
        if name not in NOT_KERNELS:
            self.steps.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        self.watch.launches.append("graph")
        self.watch.queued += self.kernels
        self.replays += 1
        last, self.watch.replayed = self.watch.replayed, self
        with _disable_current_modes():
            if last is not None and last is not self:
                last.spoil()
            for func, args, kwargs, result in self.steps:
                new = func(*args, **kwargs)
                if not _aliases(func):
                    pytree.tree_map(_copied, result, new)

    def spoil(self) -> None:
        """Overwrite what the kernels have written, but not what was there before."""
        for func, _, _, result in self.steps:
            if not _aliases(func):
                pytree.tree_map_only(Tensor, _spoil, result)


def _aliases(func) -> bool:
    """Return True where an operation returns memory that it was given."""
    return any(r.alias_info is not None for r in func._schema.returns)


def _spoil(x: Tensor) -> None:
    x.fill_(torch.nan if x.is_floating_point() else x.dtype != torch.bool and -(2**30))


def _copied(held: Tensor, new: Tensor) -> None:
    if held.data_ptr() != new.data_ptr():
        held.copy_(new)


@contextmanager
def capturing(
    cuda_graph: Graph, pool=None, stream=None, capture_error_mode="global"
) -> Iterator[None]:
    assert stream == "stream"  # or it would be one of the current device, not of the network's
    assert pool is not None  # or each graph would have memory of its own
    assert capture_error_mode == "thread_local"  # or what other threads do would end it
    cuda_graph.begin()
    try:
        yield
    finally:
        cuda_graph.end()


@contextmanager
def recordable(watch) -> Iterator[None]:
    """Let calls be recorded while entered."""
    names = {
        "CUDAGraph": lambda: Graph(watch),
        "graph": capturing,
        "graph_pool_handle": object,
        "synchronize": lambda device: None,
        "Stream": lambda device: "stream",
        "current_stream": lambda device: "current",
        "stream": lambda stream: nullcontext(),
    }
    with (
        mock.patch.multiple(torch.cuda, **names),
        mock.patch("textdiff.sampling.predictor.replays", return_value=True),
    ):
        yield
