"""Muon among processes: the steps of one, in few exchanges."""

import pytest
import torch
from forked_ranks import in_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from textdiff.train import optim

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


def steps(place) -> tuple[list[torch.Tensor], int]:
    """Parameters after two steps, and the exchanges of the second one."""
    parameters = [torch.nn.Parameter(place(matrix)) for matrix in random_matrices(0)]
    muon = optim.Muon(parameters, lr=0.1, weight_decay=0.1)
    for seed in (1, 2):
        for parameter, gradient in zip(parameters, random_matrices(seed), strict=True):
            parameter.grad = place(gradient)
        with CommDebugMode() as exchanges:
            muon.step()
    state = muon.state[parameters[0]]["momentum_buffer"]
    assert isinstance(state, DTensor) == isinstance(parameters[0], DTensor)
    return [p.detach() for p in parameters], exchanges.get_total_counts()


@pytest.mark.parametrize("name", MESHES)
def test_owners_take_the_steps_of_one_process(name, monkeypatch):
    monkeypatch.setattr(optim, "native_bf16", lambda device: False)
    shape, most = MESHES[name]
    expected, _ = steps(lambda matrix: matrix)

    def work(rank: int):
        if shape is None:
            found, count = steps(lambda matrix: matrix.clone())
            return found, count, None
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        placements = [Replicate(), Shard(0)][-len(shape) :]
        found, count = steps(lambda matrix: distribute_tensor(matrix, mesh, placements))
        with CommDebugMode() as alone:  # the same products on sharded matrices
            optim.orthogonal(distribute_tensor(random_matrices(0)[0], mesh, placements))
        return [p.full_tensor() for p in found], count, alone.get_total_counts()

    ranks = in_ranks(4, work)
    assert max(count for _, count, _ in ranks) == most * len(set(SHAPES))
    for found, _, before in ranks:
        assert before is None or before > 10
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
