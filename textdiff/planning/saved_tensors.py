"""Bytes that the blocks of a network of transformers keep for the backward pass, counted by a run.

The network runs on fake tensors, which have shapes and no storage, under autograd's own hooks. What
it keeps is then right for every architecture. Attention is a stand-in that keeps queries, keys,
values and mixture; what a kernel keeps besides does not depend on the architecture.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.backbone_attention import NAME
from textdiff.models.shapes import ShapesOnly

TOKENS = 64


@dataclass(frozen=True)
class SavedBytes:
    """Bytes per position of tensors that all blocks together keep.

    Attributes:
        sizes: of each tensor, in the order of the operations.
    """

    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return sum(self.sizes)

    @property
    def widest(self) -> int:
        """Bytes of the largest one."""
        return max(self.sizes)

    def up_to(self, size: int) -> int:
        """Return the bytes of those that are smaller than a size."""
        return sum(each for each in self.sizes if each < size)


def count_saved(model: TransformersDenoiser, half: bool) -> SavedBytes:
    """Return the bytes per position that the blocks keep.

    Args:
        model: the network, on the meta device. It is left with fake weights.
        half: whether products are computed in bfloat16, under autocast.
    """
    with FakeTensorMode(), ShapesOnly():
        _without_storage(model.train())
        # Weights and their casts do not grow with the rows.
        one, two = (_saved(model, rows, half) for rows in (1, 2))
    return SavedBytes(tuple((b - a) // TOKENS for a, b in zip(one, two, strict=True)))


def _without_storage(model: nn.Module) -> None:
    """Replace tensors of the meta device by fake ones of the CPU, which autocast acts on."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in groups:
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    is_weight = isinstance(old, nn.Parameter)
                    replaced[id(old)] = nn.Parameter(new, old.requires_grad) if is_weight else new
                tensors[name] = replaced[id(old)]


def _saved(model: TransformersDenoiser, rows: int, half: bool) -> list[int]:
    """Return the bytes of every storage that the blocks keep, in the order of their operations."""
    kept: dict[int, Tensor] = {}
    inside = False

    def keep(tensor: Tensor) -> Tensor:
        if inside:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    hooks = [
        model.blocks[0].register_forward_pre_hook(enter),
        model.blocks[-1].register_forward_hook(leave),
    ]
    embedding = model.network.get_input_embeddings()
    inputs = embedding(torch.zeros(rows, TOKENS, dtype=torch.int64))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        model.network.base_model(inputs_embeds=inputs, use_cache=False, **{NAME: _stand_in})
    for hook in hooks:
        hook.remove()
    return [tensor.untyped_storage().nbytes() for tensor in kept.values()]


def _stand_in(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: Any) -> Tensor:
    """Return a mixture [B, heads, T, D], and keep what every kernel keeps."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    mixture: Tensor = _Mixture.apply(query.to(value.dtype), key.to(value.dtype), value)  # type: ignore[no-untyped-call]
    return mixture


class _Mixture(torch.autograd.Function):
    """Attention without scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query.transpose(1, 2).contiguous()).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], gradients[0], gradients[0]
