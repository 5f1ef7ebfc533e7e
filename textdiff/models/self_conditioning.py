"""Self-conditioning: an earlier prediction of the same tokens as a second input of the network.

The expected embedding p_0 E of a prediction p_0 is normalised, passes through an MLP and is added
to the embedding of the noisy token (arXiv:2208.04202; under masks arXiv:2604.26985 and
arXiv:2510.19304). The MLP's last layer starts at zero: a network begins as it is without it.
Finished tokens have no prediction, so that a cache of their keys and values stays exact.

Shapes: B rows, L positions, T = L or 2L inputs, H hidden, N positions with an earlier prediction.
"""

from typing import NamedTuple

from torch import Tensor, nn

from .configuration import TextDiffusionConfig
from .layers import NORMS


class Previous(NamedTuple):
    """Earlier predictions of some positions.

    Attributes:
        at: [N] flat indices into B * L noisy tokens, all different.
        expected: [N, H] expected embeddings of the clean tokens, from `Denoiser.expected`.
    """

    at: Tensor
    expected: Tensor


class SelfConditioning(nn.Module):
    """Map of expected embeddings to what is added to those of noisy tokens: MLP(norm(p_0 E))."""

    def __init__(self, config: TextDiffusionConfig):
        super().__init__()
        size = config.hidden_size
        self.norm = NORMS[config.norm](size)
        self.mlp = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size))
        self.mlp[-1].gates = ()  # marked so that it is initialised to zero

    def forward(self, x: Tensor, previous: Previous, length: int) -> Tensor:
        """Add to embeddings.

        Args:
            x: [B, T, H], the noisy stream first.
            previous: earlier predictions of noisy tokens.
            length: L.

        Returns:
            [B, T, H].
        """
        added = self.mlp(self.norm(previous.expected)).to(x.dtype)  # [N, H]
        at = previous.at + previous.at // length * (x.shape[1] - length)
        return x.flatten(0, 1).index_add(0, at, added).view_as(x)
