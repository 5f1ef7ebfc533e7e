"""Sizes of a network's blocks that decide what they keep for the backward pass."""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from textdiff.config.networks import Network, TextDiffNetwork


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of the Transformer blocks, which are alike.

    Attributes:
        layers: how many there are.
        hidden: channels of the residual stream.
        heads: attention heads of queries.
        channels: channels per head.
        inner: channels between the MLP's two products.
        gated: whether the MLP multiplies them by an activated gate.
        rms: whether norms are RMS norms.
        qk_norm: whether queries and keys are normalised.
        dropout: whether branches draw dropout masks.
        modulated: whether the noise level modulates norms and branches.
        levels: whether the true noise level enters there.
    """

    layers: int
    hidden: int
    heads: int
    channels: int
    inner: int
    gated: bool
    rms: bool
    qk_norm: bool
    dropout: bool
    modulated: bool = False
    levels: bool = False


def block_sizes_of(network: Network, configuration: PreTrainedConfig) -> BlockSizes:
    """Return the sizes of a network's blocks.

    Args:
        network: its section in the config.
        configuration: its configuration.
    """
    assert isinstance(network, TextDiffNetwork)
    hidden, gated = network.hidden_size, network.mlp == "swiglu"
    return BlockSizes(
        layers=network.num_layers,
        hidden=hidden,
        heads=network.num_heads,
        channels=hidden // network.num_heads,
        inner=64 * -(-8 * hidden // 192) if gated else 4 * hidden,
        gated=gated,
        rms=network.norm == "rmsnorm",
        qk_norm=network.qk_norm,
        dropout=network.dropout > 0.0,
        modulated=network.adaln,
        levels=network.time_conditioning,
    )
