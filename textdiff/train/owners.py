"""Matrices divided among processes: each has one owner, which orthogonalises it for all.

| processes hold | exchanged for all matrices of one shape |
|---|---|
| the same matrices (DDP) | the owners' results, by one all-gather |
| rows of them (FSDP2) | rows to the owner and back, by two all-to-alls |
| rows, several times (HSDP) | both: the replicas divide the matrices, then the shards do |

Letters: P processes of a group, K matrices [m, n] of one shape, k those of one owner.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Group = dist.ProcessGroup | None
MatrixFunction = Callable[[Tensor], Tensor]


class MatrixGroups(NamedTuple):
    """Groups of processes over which a matrix is spread.

    Attributes:
        replicas: processes with the same rows; None: there is one.
        shards: processes with different rows; None: one has them all.
    """

    replicas: Group
    shards: Group

    @classmethod
    def of(cls, parameter: Tensor) -> "MatrixGroups":
        """Return those of a parameter: its mesh's, or all processes if it is whole on each."""
        if not isinstance(parameter, DTensor):
            several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            return cls(dist.group.WORLD if several else None, None)
        groups: dict[bool, Group] = {}
        for dimension, placement in enumerate(parameter.placements):
            groups[isinstance(placement, Shard)] = parameter.device_mesh.get_group(dimension)
        return cls(groups.get(False), groups.get(True))

    @property
    def alone(self) -> bool:
        """True where one process has everything."""
        return self.replicas is None and self.shards is None


class Ownership:
    """Division of K matrices of one shape among the processes of a group: dealt out in turn.

    Args:
        group: the processes; None: this one owns all.
        first: the process that the first matrix goes to, so that several shapes are spread evenly.
    """

    def __init__(self, group: Group, first: int = 0):
        self.group = group
        self.count = 1 if group is None else group.size()
        self.rank = 0 if group is None else group.rank()
        self.first = first % self.count

    def owned(self, rank: int) -> slice:
        """Return which matrices a process owns."""
        return slice((rank - self.first) % self.count, None, self.count)

    def place(self, index: int) -> tuple[int, int]:
        """Return the owner of a matrix, and its place among the owner's."""
        return (index + self.first) % self.count, index // self.count


def own_rows(matrix: Tensor) -> Tensor:
    """Return the rows of a matrix that this process has, without a copy."""
    return matrix.to_local() if isinstance(matrix, DTensor) else matrix


def apply_by_owners(
    matrices: list[Tensor], rows: int, groups: MatrixGroups, first: int, function: MatrixFunction
) -> list[Tensor]:
    """Apply a function to whole matrices, each of them in one process.

    Args:
        matrices: K of one shape, of each the rows [m', n] of this process.
        rows: m, of the whole matrices.
        groups: the processes.
        first: number of the matrices of other shapes before these.
        function: maps [k, m, n] to [k, m, n], matrix by matrix.

    Returns:
        K results, of each the rows [m', n] of this process.
    """
    owners = Ownership(groups.replicas, first)
    own = matrices[owners.owned(owners.rank)]
    within = Ownership(groups.shards, first // owners.count)
    done = _by_shards(own, rows, within, function) if own else []
    if owners.count == 1:
        return done
    room = -(-len(matrices) // owners.count)
    sent = matrices[0].new_zeros(room, *matrices[0].shape)  # [room, m', n]
    for place, matrix in enumerate(done):
        sent[place] = matrix
    received = sent.new_empty(owners.count * room, *sent.shape[1:])  # [P room, m', n]
    dist.all_gather_into_tensor(received, sent, group=owners.group)
    by_owner = received.view(owners.count, *sent.shape)
    return [by_owner[owners.place(index)] for index in range(len(matrices))]


def _by_shards(
    matrices: list[Tensor], rows: int, owners: Ownership, function: MatrixFunction
) -> list[Tensor]:
    """Apply a function to matrices whose rows are spread over the processes of one group."""
    if owners.count == 1:
        return list(function(torch.stack(matrices)))
    height, columns = matrices[0].shape
    counts = [len(matrices[owners.owned(rank)]) for rank in range(owners.count)]  # k of each
    own, heights = counts[owners.rank], _heights(rows, owners.count)  # m' of each
    by_owner = [count * height * columns for count in counts]
    by_rows = [own * h * columns for h in heights]
    ordered = [m for rank in range(owners.count) for m in matrices[owners.owned(rank)]]
    received = _exchange(torch.stack(ordered).flatten(), by_owner, by_rows, owners.group)
    pieces = zip(torch.split(received, by_rows), heights, strict=True)
    whole = torch.cat([piece.view(own, h, columns) for piece, h in pieces], dim=1)  # [k, m, n]
    done = function(whole) if own else whole
    back = torch.cat([piece.flatten() for piece in torch.split(done, heights, dim=1)])
    returned = _exchange(back, by_rows, by_owner, owners.group)
    pairs = zip(torch.split(returned, by_owner), counts, strict=True)
    results = [piece.view(k, height, columns) for piece, k in pairs]
    places = (owners.place(index) for index in range(len(matrices)))
    return [results[rank][at] for rank, at in places]


def _heights(rows: int, processes: int) -> list[int]:
    """Return how many rows each process has, as FSDP2 cuts them: equal numbers, the rest last."""
    most = -(-rows // processes)
    return [min(most, max(0, rows - rank * most)) for rank in range(processes)]


def _exchange(values: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Send so many values to each process and return those that come from each."""
    result = values.new_empty(sum(received))
    dist.all_to_all_single(result, values, received, sent, group=group)
    return result
