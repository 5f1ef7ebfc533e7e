"""Blocks in bfloat16 between an embedding, norms and a head in float32, for networks that only run.

GPUs multiply bfloat16 much faster than float32. Norms and logits lose most by its seven bits, and
take little time. Hidden states between norms are in bfloat16.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .interface import Denoiser

HALF = torch.bfloat16


@torch.no_grad()
def halve_blocks(denoiser: Denoiser) -> Denoiser:
    """Store the matrices of a float32 network's blocks in bfloat16, in place, for inference."""
    for block in denoiser.blocks:
        norms = [module for module in block.modules() if is_norm(module)]
        kept = {id(p) for module in norms for p in module.parameters()}
        for parameter in block.parameters():
            if parameter.is_floating_point() and id(parameter) not in kept:
                parameter.data = parameter.data.to(HALF)
        for module in norms:
            module.register_forward_pre_hook(_widened)
            module.register_forward_hook(_narrowed)
        if hasattr(block, "adaLN_modulation"):
            block.adaLN_modulation.register_forward_pre_hook(_halved)
        block.register_forward_pre_hook(_halved, with_kwargs=True)
    denoiser.blocks[-1].register_forward_hook(_leaving)
    denoiser.block_dtype = HALF
    return denoiser


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises, with weights of its own."""
    return "norm" in type(module).__name__.lower() and not any(module.children())


def dtype_name(denoiser: Denoiser) -> str:
    """Return the dtypes that a network computes in, for the record of a result."""
    name = str(denoiser.dtype).removeprefix("torch.")
    if denoiser.block_dtype is None:
        return name
    return f"{str(denoiser.block_dtype).removeprefix('torch.')}, {name} head and norms"


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _widened(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast what a norm reads to float32."""
    return tuple(_cast(value, torch.float32) for value in inputs)


def _narrowed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Cast what a norm returns to bfloat16."""
    return _cast(output, HALF)


def _leaving(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Cast what the last block returns to float32: what follows is the head's."""
    if isinstance(output, tuple):
        return tuple(_cast(value, torch.float32) for value in output)
    return _cast(output, torch.float32)


def _halved(module: nn.Module, inputs: tuple[Any, ...], options: Any = None) -> Any:
    """Cast what a block reads to bfloat16."""
    inputs = tuple(_cast(value, HALF) for value in inputs)
    if options is None:
        return inputs
    return inputs, {name: _cast(value, HALF) for name, value in options.items()}
