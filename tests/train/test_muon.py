"""Muon against torch's, and what it does where bfloat16 is emulated."""

import pytest
import torch

from textdiff.train import optim


def walk(optimizer: type, matrix: torch.Tensor, **options: float) -> tuple[torch.Tensor, dict]:
    """Five steps along fixed gradients."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.nn.Parameter(matrix.clone())
    chosen = optimizer([parameter], lr=0.02, **options)
    for _ in range(5):
        parameter.grad = torch.randn(matrix.shape, generator=generator)
        chosen.step()
    return parameter.detach(), chosen.state_dict()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
@pytest.mark.parametrize("native", [True, False])
def test_steps_are_those_of_torch(monkeypatch, shape, native):
    monkeypatch.setattr(optim, "native_bf16", lambda device: native)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, state = walk(torch.optim.Muon, matrix, weight_decay=0.1)
    found, own = walk(optim.Muon, matrix, weight_decay=0.1)
    moved = (expected - matrix).norm()
    # In bfloat16 they round alike; in float32 ours is the better product.
    assert (found - expected).norm() <= (1e-6 if native else 0.02) * moved
    assert not native or torch.equal(
        own["state"][0]["momentum_buffer"], state["state"][0]["momentum_buffer"]
    )


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_singular_values_come_near_one(monkeypatch, shape):
    monkeypatch.setattr(optim, "native_bf16", lambda device: False)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = optim.orthogonal(matrix)
    assert found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # The same directions: U^T and V take it to a diagonal matrix.
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    diagonal = u.T @ found @ v.T
    assert (diagonal - diagonal.diagonal().diag()).abs().max() < 1e-4
