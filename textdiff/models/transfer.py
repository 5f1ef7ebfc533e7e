"""Copies of small tensors of the CPU, such as indices, to the device of a network."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Devices that read the memory of the CPU as it is, or cannot pin it.
UNPINNED = ("cpu", "mps")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for what runs there.

    From ordinary memory a GPU copies only once its queue is empty, from pinned memory in turn.
    """
    if x.device == device or x.device.type != "cpu" or device.type in UNPINNED:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def on_device(like: Tensor, index: Tensor | Sequence[int]) -> Tensor:
    """Return an index on the device of the tensor that it is for."""
    return to_device(torch.as_tensor(index, dtype=torch.int64), like.device)
