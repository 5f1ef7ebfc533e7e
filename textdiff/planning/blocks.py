"""Sizes of a network's blocks that decide what they keep for the backward pass."""

import math
from dataclasses import dataclass

from torch import nn

from textdiff.config.networks import Network, TextDiffNetwork
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of the Transformer blocks, which are alike.

    Attributes:
        layers: how many there are.
        hidden: channels of the residual stream.
        heads: attention heads of queries.
        key_heads: heads of keys and values, each for several of queries.
        channels: channels per head.
        inner: channels between the MLP's two products, of all experts that a token takes.
        activation: tensors of `inner` channels that the activation keeps besides the product's
            input and output.
        gated: whether the MLP multiplies them by an activated gate.
        experts: experts that a token takes; 0: the MLP is one.
        readers: matrices that read normed hidden states; under autocast each casts them itself.
        norms: norms of the residual stream.
        rms: whether norms are RMS norms.
        qk_norm: whether queries and keys are normalised.
        dropout: whether branches draw dropout masks.
        modulated: whether the noise level modulates norms and branches.
        levels: whether the true noise level enters there.
        ours: whether the blocks are ours: on a CPU their MLP has its own kernels, and the last one
            leaves out what the loss does not read.
    """

    layers: int
    hidden: int
    heads: int
    key_heads: int
    channels: int
    inner: int
    gated: bool
    rms: bool
    qk_norm: bool
    dropout: bool = False
    modulated: bool = False
    levels: bool = False
    experts: int = 0
    readers: int = 2
    norms: int = 2
    activation: int = 0
    ours: bool = True


def block_sizes_of(network: Network, model: Denoiser) -> BlockSizes:
    """Return the sizes of a network's blocks.

    Args:
        network: its section in the config.
        model: the network, which may be on the meta device.
    """
    if isinstance(network, TextDiffNetwork):
        return _own(network)
    assert isinstance(model, TransformersDenoiser)
    return _of_transformers(model)


def _own(network: TextDiffNetwork) -> BlockSizes:
    hidden, gated = network.hidden_size, network.mlp == "swiglu"
    return BlockSizes(
        layers=network.num_layers,
        hidden=hidden,
        heads=network.num_heads,
        key_heads=network.num_heads,
        channels=hidden // network.num_heads,
        inner=64 * -(-8 * hidden // 192) if gated else 4 * hidden,
        gated=gated,
        rms=network.norm == "rmsnorm",
        qk_norm=network.qk_norm,
        dropout=network.dropout > 0.0,
        modulated=network.adaln,
        levels=network.time_conditioning,
    )


# Activations made of elementary operations, and the tensors that these keep.
ELEMENTARY = {"NewGELUActivation": 3, "FastGELUActivation": 3, "QuickGELUActivation": 1}


def _of_transformers(model: TransformersDenoiser) -> BlockSizes:
    """Read the sizes from a block: its norms, and the matrices inside and outside its attention."""
    block, config = model.blocks[-1], model.config
    hidden = model.network.get_input_embeddings().weight.shape[1]
    attention = next(m for m in block.modules() if hasattr(m, "textdiff_layer"))
    inside = set(attention.modules())
    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower()]
    stream = [norm for norm in norms if norm not in inside]
    experts = int(getattr(config, "num_experts_per_tok", None) or 0)
    inner = int(
        experts * getattr(config, "moe_intermediate_size", 0)
        or getattr(config, "intermediate_size", None)
        or 4 * hidden
    )
    outside = [m for m in block.modules() if m not in inside]
    shapes = [p.shape for m in outside for p in m.parameters(recurse=False) if p.ndim == 2]
    kinds = {type(m).__name__ for m in block.modules()}
    return BlockSizes(
        layers=model.layers,
        hidden=hidden,
        heads=int(config.num_attention_heads),
        key_heads=model.key_heads,
        channels=model.head_dim,
        inner=inner,
        gated=experts > 0 or sum(map(math.prod, shapes)) > 2.75 * hidden * inner,
        experts=experts,
        readers=max(2, sum(p.ndim == 2 for p in block.parameters()) - 2),  # all but the two outputs
        rms=not any(isinstance(norm, nn.LayerNorm) for norm in stream),
        qk_norm=any(norm in inside for norm in norms),
        norms=max(2, len(stream)),
        activation=max((ELEMENTARY.get(kind, 0) for kind in kinds), default=0),
        ours=False,
    )
