"""Rows of a frozen embedding that are trained alone.

peft trains single rows as well, by a copy of the whole table in every call; here only the rows
exist twice. Adapters are saved in its format.

Shapes: V rows of the embedding, n trained ones, H channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TrainedRows(nn.Module):
    """Embedding with some rows of its own, those of tokens that were added.

    A head that shares the embedding's weight keeps its rows: such tokens are never predicted.

    Args:
        base_layer: the embedding.
        ids: tokens whose rows are trained.

    Attributes:
        rows: [n, H] their rows, which start as those of the embedding.
    """

    def __init__(self, base_layer: nn.Embedding, ids: Sequence[int]):
        super().__init__()
        self.base_layer, self.ids = base_layer, list(ids)
        table = base_layer.weight
        index = torch.tensor(self.ids, device=table.device)
        self.rows = nn.Parameter(table.detach()[index].clone())  # [n, H]
        slots = torch.full((len(table),), -1, device=table.device)  # [V]
        slots[index] = torch.arange(len(self.ids), device=table.device)
        self.register_buffer("slots", slots, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table [V, H], without the rows."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Map [...] ids to [..., H]."""
        slot = self.slots[ids]  # [...]
        scale = getattr(self.base_layer, "embed_scale", 1.0)  # architectures that scale embeddings
        own = nn.functional.embedding(slot.clamp(min=0), self.rows) * scale  # [..., H]
        return torch.where((slot >= 0).unsqueeze(-1), own, self.base_layer(ids))

    def merged(self) -> Tensor:
        """Return the table [V, H] with the rows in it."""
        index = torch.tensor(self.ids, device=self.rows.device)
        return self.weight.detach().index_copy(0, index, self.rows.detach())
