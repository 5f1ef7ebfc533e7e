"""Sizes of a network's blocks that decide what they keep for the backward pass."""

from dataclasses import dataclass

from textdiff.config.networks import Network, TextDiffNetwork
from textdiff.models import Denoiser
from textdiff.models.backbone import TransformersDenoiser
from textdiff.planning.saved_tensors import SavedBytes, count_saved


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of the Transformer blocks, which are alike.

    Attributes:
        layers: how many there are.
        hidden: channels of the residual stream.
        heads: attention heads of queries.
        channels: channels per head.
        inner: channels between the MLP's two products, gate and values together.
        counted: what the blocks of a network of transformers keep. None: they are ours, on a CPU
            their MLP has its own kernels, and the last one leaves out what the loss does not read.
    """

    layers: int
    hidden: int
    heads: int
    channels: int
    inner: int = 0
    counted: SavedBytes | None = None


def block_sizes_of(network: Network, model: Denoiser, half: bool) -> BlockSizes:
    """Return the sizes of a network's blocks.

    Args:
        network: its section in the config.
        model: the network on the meta device. One of transformers is left with fake weights.
        half: whether products are computed in bfloat16.
    """
    if isinstance(network, TextDiffNetwork):
        hidden = network.hidden_size
        inner = 4 * hidden if network.mlp == "gelu" else 2 * 64 * -(-8 * hidden // 192)
        heads = network.num_heads
        return BlockSizes(network.num_layers, hidden, heads, hidden // heads, inner)
    assert isinstance(model, TransformersDenoiser)
    return BlockSizes(
        layers=model.layers,
        hidden=model.network.get_input_embeddings().weight.shape[1],
        heads=int(model.config.num_attention_heads),
        channels=model.head_dim,
        counted=count_saved(model, half),
    )
