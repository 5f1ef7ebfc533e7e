"""Weights spread over processes by FSDP2: what is gathered together, when, and in which precision.

| group | holds | gathered |
|---|---|---|
| one per block | its matrices | for the block's passes; in bf16 runs in bfloat16 |
| embedding | its table | while tokens are looked up |
| head | what maps hidden states to logits | while the loss is summed, gradients included |
| root | the rest | for the whole pass |

A block's matrices in bfloat16 have the values that autocast would cast them to. So a sharded run
has the numbers of an unsharded one. A matrix that is used twice in a pass is the exception, as in
the last block of two streams: its gradients are added in bfloat16. Half as much is sent, and
autocast makes no casts, which it would keep until the end of the forward pass.

What autocast leaves in float32 is gathered so: vectors, embeddings, the modules around the blocks,
and the head. The head's gradient is a sum over chunks of positions, which bfloat16 would round once
per chunk. Gradients are added up over processes in float32. The loss stays as it is: no module's
outputs are cast.
"""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from textdiff.config import TrainConfig
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.train.optim import build_optimizers

FULL = MixedPrecisionPolicy()
# Blocks run under autocast and take their inputs as they are: the residual stream stays float32.
HALF = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
)


def prepare_training(
    module: nn.Module, accelerator: Accelerator, config: TrainConfig
) -> tuple[nn.Module, list[Optimizer]]:
    """Make a training loss and its optimizers fit the processes of the run.

    Args:
        module: from `training_loss`.
        accelerator: the processes.
        config: the optimizers, and when gradients are exchanged.

    Returns:
        The module to train, and the optimizers of its parameters.
    """
    denoiser: Any = module.denoiser
    if not accelerator.is_fsdp2:
        optimizers = build_optimizers(denoiser, config)
        module, *optimizers = accelerator.prepare(module, *optimizers)
        return module, optimizers
    shard(module, accelerator)
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = config.sync_each_batch
    optimizers = build_optimizers(denoiser, config)
    return module, [accelerator.prepare_optimizer(optimizer) for optimizer in optimizers]


def shard(module: Any, accelerator: Accelerator) -> None:
    """Spread the parameters of a training loss over processes, in place.

    Args:
        module: from `training_loss`.
        accelerator: the processes; accelerate's plugin for FSDP says what is gathered again.
    """
    plugin = accelerator.state.fsdp_plugin
    options: dict[str, Any] = {"mesh": data_mesh(accelerator)}
    half, denoiser = accelerator.mixed_precision == "bf16", module.denoiser
    vectors = _owners_of_vectors(denoiser.blocks) if half else []
    for block in denoiser.blocks:
        fully_shard(
            block,
            **options,
            mp_policy=HALF if half else FULL,
            reshard_after_forward=plugin.reshard_after_forward,
            ignored_params={p for p in block.parameters() if p.ndim < 2} if half else None,
        )
    for table in tables_apart(denoiser, module.head_sum):
        fully_shard(table, **options, mp_policy=FULL)
        # A lookup is differentiated by its indices; the head has its gradients from the sum.
        table.set_unshard_in_backward(False)  # type: ignore[operator]
    sharded: set[Any] = {p for p in module.parameters() if isinstance(p, DTensor)}
    module.vectors = nn.ModuleList(vectors)  # reachable for the root's group from outside of blocks
    fully_shard(module, **options, mp_policy=FULL, ignored_params=sharded)


def sum_over_replicas(module: nn.Module, due: bool) -> None:
    """Exchange the next gradients among replicas of the shards, or add them up until it is due."""
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(due)


def data_mesh(accelerator: Accelerator) -> DeviceMesh:
    """Return the mesh of all processes: [shards], or [replicas, shards] (HSDP)."""
    sizes = accelerator.parallelism_config
    if sizes is None or not sizes.dp_shard_enabled:
        return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    mesh: DeviceMesh = accelerator.torch_device_mesh[tuple(sizes.dp_dim_names)]
    return mesh


def _owners_of_vectors(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the modules inside of blocks that have vectors: norms, and maps with a bias."""
    inside = (module for block in blocks for module in block.modules())
    return [m for m in inside if any(p.ndim < 2 for p in m.parameters(recurse=False))]


def tables_apart(denoiser: Denoiser, head: nn.Module) -> list[nn.Module]:
    """Return embedding and head where each is gathered by itself.

    One table that is both is needed from the first operation of a pass to the last one. A network
    that reads its own predictions uses both tables outside of these modules.
    """
    core = denoiser.network if isinstance(denoiser, TransformersDenoiser) else denoiser
    embedding: nn.Module = core.get_input_embeddings()  # type: ignore[operator]
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}
    return [] if shared or denoiser.self_conditioning is not None else [embedding, head]
