"""Devices: copies of small tensors to them, and blocks that are compiled for them.

torch compiles a function anew for other shapes, for evaluation, for generation. After some variants
it gives up and runs the function as it is, many times slower, with a line in a log. Here the limit
is higher, to reach it is an error, and only training is compiled.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# Devices that read the memory of the CPU as it is, or cannot pin it.
UNPINNED = ("cpu", "mps")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for what runs there.

    From ordinary memory a GPU copies only once its queue is empty, from pinned memory in turn.
    """
    if x.device == device or x.device.type != "cpu" or device.type in UNPINNED:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)  # not of an expanded one


class Readback:
    """Numbers that a device copies to the CPU by itself, once it has them.

    Work that is queued after the copy does not delay it. So the device has something to do while
    the CPU waits for these numbers.

    Args:
        x: on any device; on the CPU it is there at once.

    Attributes:
        immediate: True where nothing has to be copied.
    """

    def __init__(self, x: Tensor):
        self.immediate = x.device.type in UNPINNED
        self._copied: torch.Event | None = None
        if self.immediate:
            self._here = x.cpu()
            return
        self._here = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._here.copy_(x, non_blocking=True)
        self._copied = torch.Event(device=x.device)
        # By default it is that of the current device, on which the tensor may not be.
        self._copied.record(torch.accelerator.current_stream(x.device))

    @property
    def arrived(self) -> bool:
        """True where reading would not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> Tensor:
        """Return the numbers on the CPU, waiting for the copy if need be."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._here


def on_device(like: Tensor, index: Tensor | Sequence[int]) -> Tensor:
    """Return an index on the device of the tensor that it is for."""
    return to_device(torch.as_tensor(index, dtype=torch.int64), like.device)


# Of one function: a block has one with and one without gradients for each layout that is trained.
VARIANTS = 64


def refuse_fallbacks() -> None:
    """Allow more variants than torch does, and raise an error where they are exhausted."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.fail_on_recompile_limit_hit = True


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile the blocks of a network, each of them by itself."""
    refuse_fallbacks()
    for block in blocks:
        block.compile()


def uncompiled(active: bool) -> AbstractContextManager[Any]:
    """Run compiled functions as they are while entered, where their shapes differ every time.

    Args:
        active: whether any is compiled; else nothing is imported.
    """
    return torch.compiler.set_stance("force_eager") if active else nullcontext()


def compilation_counts() -> dict[str, int]:
    """Return how many graphs torch has compiled so far, and how often one was broken."""
    from torch._dynamo.utils import counters

    breaks = sum(counters["graph_break"].values())
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": breaks}


def describe_compilation() -> str:
    """Return the same as a sentence."""
    counts = compilation_counts()
    return f"torch.compile made {counts['graphs']} graphs, with {counts['breaks']} breaks"
