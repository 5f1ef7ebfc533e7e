"""Muon among processes: the steps of one, in few exchanges."""

from unittest import mock

import pytest
import torch
from forked_ranks import in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from textdiff.train import optim
from textdiff.train.optim import orthogonal

pytestmark = pytest.mark.dist

# Rows that four processes share evenly, unevenly, and not all of them.
SHAPES = [(8, 6)] * 3 + [(6, 8)] * 5 + [(3, 5)]
MESHES = {
    "ddp": (None, 1),
    "fsdp2": ((4,), 2),
    "hsdp": ((2, 2), 3),
}


def random_matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def steps(place) -> tuple[list[torch.Tensor], int, int]:
    """Parameters after two steps; exchanges and orthogonalised matrices of the second one."""
    parameters = [torch.nn.Parameter(place(matrix)) for matrix in random_matrices(0)]
    muon = optim.Muon(parameters, lr=0.1, weight_decay=0.1)
    for seed in (1, 2):
        for parameter, gradient in zip(parameters, random_matrices(seed), strict=True):
            parameter.grad = place(gradient)
        made: list[int] = []

        def counted(x: torch.Tensor, made=made) -> torch.Tensor:
            made.append(len(x) if x.ndim == 3 else 1)
            return orthogonal(x)

        with CommDebugMode() as exchanges, mock.patch.object(optim, "orthogonal", counted):
            muon.step()
    state = muon.state[parameters[0]]["momentum_buffer"]
    assert isinstance(state, DTensor) == isinstance(parameters[0], DTensor)
    return [p.detach() for p in parameters], exchanges.get_total_counts(), sum(made)


@pytest.mark.parametrize("name", MESHES)
def test_owners_take_the_steps_of_one_process(name, monkeypatch):
    monkeypatch.setattr(optim, "native_bf16", lambda device: False)
    shape, most = MESHES[name]
    expected, _, alone = steps(lambda matrix: matrix)
    assert alone == len(SHAPES)

    def work(rank: int):
        if shape is None:
            return *steps(lambda matrix: matrix.clone()), None
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        placements = [Replicate(), Shard(0)][-len(shape) :]
        found, *counts = steps(lambda matrix: distribute_tensor(matrix, mesh, placements))
        with CommDebugMode() as unowned:  # the same products on sharded matrices
            optim.orthogonal(distribute_tensor(random_matrices(0)[0], mesh, placements))
        return [p.full_tensor() for p in found], *counts, unowned.get_total_counts()

    ranks = in_ranks(4, work)
    assert max(count for _, count, *_ in ranks) == most * len(set(SHAPES))
    shares = [made for *_, made, _ in ranks]
    assert (sum(shares), max(shares)) == (9, 3)  # each matrix once, in any process
    for found, *_, before in ranks:
        assert before is None or before > 10
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
