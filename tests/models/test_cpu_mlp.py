"""MLPs as a CPU trains them, against the plain equations, forward and backward."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from textdiff.models import cpu_kernels
from textdiff.models.block import MLPS
from textdiff.models.cpu_mlp import Gelu

SIZE = 6
KINDS = pytest.mark.parametrize("kind", list(MLPS))


def network(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return MLPS[kind](SIZE).to(dtype)


def run(mlp, *shape):
    """Its values, and the gradients of its input and parameters under random cotangents."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(mlp.parameters()).dtype
    x, weights = torch.randn(2, *shape, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    y = mlp(x.requires_grad_())
    return [y, *torch.autograd.grad(y, [x, *mlp.parameters()], weights)]


@KINDS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 4, 1000], ids="{} rows at once".format)
@pytest.mark.parametrize("piece", [1, 60, 2**20])
def test_equals_the_path_of_other_devices(monkeypatch, kind, dtype, tolerance, rows, piece):
    monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", rows * 4 * SIZE * dtype.itemsize)
    monkeypatch.setattr("textdiff.models.cpu_mlp.PIECE", piece)
    mlp = network(kind, dtype)
    found = run(mlp, 3, 7)
    monkeypatch.setattr(cpu_kernels, "applies", lambda x: False)
    for left, right in zip(found, run(mlp, 3, 7), strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@KINDS
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3, 4)], ids=str)
def test_takes_any_shape(monkeypatch, kind, shape):
    mlp = network(kind)
    found = run(mlp, *shape)
    monkeypatch.setattr(cpu_kernels, "applies", lambda x: False)
    for left, right in zip(found, run(mlp, *shape), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_one_sigmoid_is_the_tanh_form():
    h = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])])
    h = h.double().requires_grad_()
    wanted = torch.nn.functional.gelu(h, approximate="tanh")
    (slope,) = torch.autograd.grad(wanted.sum(), h)
    h, value, again, out = h.detach(), *torch.empty(3, len(h), dtype=torch.float64)
    Gelu.value(h, value)
    Gelu.slopes(h, torch.ones_like(h), again, out)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out, slope, rtol=1e-12, atol=1e-13)
    assert torch.equal(again, value)


@pytest.mark.parametrize(("kind", "values"), [("gelu", 4 * SIZE), ("swiglu", 2 * 64)])
def test_keeps_what_the_first_product_makes_and_no_activation(kind, values):
    mlp, sizes = network(kind), {}
    own = {p.data_ptr() for p in mlp.parameters()}

    def pack(saved):
        if saved.data_ptr() not in own:
            sizes[saved.data_ptr()] = saved.numel()
        return saved

    with saved_tensors_hooks(pack, lambda x: x):
        mlp(torch.randn(10, SIZE, dtype=torch.float64).requires_grad_())
    assert sum(sizes.values()) == 10 * (SIZE + values)


@KINDS
def test_half_precision_trains_by_torch(kind):
    mlp = network(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(mlp, 3, 7)
    for left, right in zip(found, run(mlp, 3, 7), strict=True):
        assert (left.float() - right).norm() < 0.03 * right.norm()
