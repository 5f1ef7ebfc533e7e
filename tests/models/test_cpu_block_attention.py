"""Chunk-wise attention over two streams against the dense 2L x 2L mask, forward and backward."""

import pytest
import torch

from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel, cpu_block_attention
from textdiff.models.attention import Attention, attend, prepare

ROWS, HEADS, LENGTH, SIZE = 3, 2, 20, 8
IDS = torch.tensor([[0] * 6 + [1] * 14, [0] * 13 + [-1] * 7, [2] * 20])
CPU = torch.device("cpu")


@pytest.fixture(params=[(32, 1), (64, 10**7), (512, 4000)], ids=str, autouse=True)
def pieces(request, monkeypatch):
    """One to five chunks, the last one shorter; one head at a time, or all rows at once."""
    monkeypatch.setattr(cpu_block_attention, "CHUNK", request.param[0])
    monkeypatch.setattr(cpu_block_attention, "SCORES", request.param[1])


def inputs(streams, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, HEADS, length * LENGTH, SIZE) for length in (streams, 2, 2)]
    draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.to(dtype).requires_grad_() for x in draws]


def run(attention, streams, dtype=torch.float64):
    """Output and gradients under a fixed random cotangent."""
    tensors = inputs(streams, dtype)
    out = attend(attention, *tensors)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, cotangent)]


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "documents"])
@pytest.mark.parametrize(("block", "causal"), [(1, False), (4, False), (5, False), (4, True)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_equals_the_dense_mask(block, causal, ids, streams, dtype, tolerance):
    layout = Layout("block_diffusion", block, ids, causal)
    chunked, dense = (prepare(b, layout, torch.empty(ROWS, 2 * LENGTH)) for b in ("sdpa", "eager"))
    assert chunked.streams is layout
    for found, wanted in zip(run(chunked, streams, dtype), run(dense, streams, dtype), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "documents"])
def test_half_precision_stays_near(ids):
    layout = Layout("block_diffusion", 4, ids)
    found = run(prepare("sdpa", layout, torch.empty(ROWS, 2 * LENGTH)), 2, torch.bfloat16)
    wanted = run(prepare("eager", layout, torch.empty(ROWS, 2 * LENGTH)), 2)
    for left, right in zip(found, wanted, strict=True):
        assert left.dtype == torch.bfloat16
        error = (left.double() - right).abs().mean() / right.abs().mean()
        assert error < 0.02


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "documents"])
def test_the_two_calls_of_other_devices(ids, streams):
    layout = Layout("block_diffusion", 4, ids)
    mask = layout.mask(2 * LENGTH, CPU)
    two_calls = Attention("sdpa", mask, length=LENGTH)
    for found, wanted in zip(
        run(two_calls, streams), run(Attention("eager", mask), streams), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaln": True, "time_conditioning": True, "qk_norm": True},
        {"adaln": True, "norm": "rmsnorm", "mlp": "swiglu"},
    ],
    ids=["plain", "conditioned", "modern"],
)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("ids", [None, IDS], ids=["rows", "documents"])
def test_a_network_trains_the_same(options, checkpointed, ids):
    """Whole networks, the last layer's short cut included, against every position computed."""
    generator = torch.Generator().manual_seed(0)
    noisy, clean = torch.randint(0, 10, (2, ROWS, LENGTH), generator=generator).unbind(0)
    sigma = torch.rand(ROWS, 5, generator=generator)
    results = []
    for backend in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = TextDiffusionConfig(
            vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **options
        )
        config._attn_implementation = backend
        model = TextDiffusionModel(config).double().train()
        for parameter in model.parameters():  # gates and scales away from where they start
            parameter.data += 0.1 * torch.randn_like(parameter)
        if checkpointed:
            model.gradient_checkpointing_enable()
        layout = Layout("block_diffusion", 4, ids)
        logits = model(noisy, clean, sigma=sigma, layout=layout).logits
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
        gradients = torch.autograd.grad((weight * logits).sum(), list(model.parameters()))
        results.append([logits.detach(), *gradients])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("length", "keeps"), [(16, True), (512, False)])
def test_what_is_kept_is_at_most_twice_the_inputs(length, keeps, monkeypatch):
    """Probabilities where they are small, so that memory stays linear in the length."""
    monkeypatch.setattr(cpu_block_attention, "CHUNK", 64)
    tensors = [torch.randn(2, 2, 2 * length, 16).requires_grad_() for _ in range(3)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, id):
        cpu_block_attention.block_attention(*tensors, Layout("block_diffusion", 4))
    inputs = sum(x.numel() for x in tensors)
    assert inputs < sum(sizes) <= 2 * inputs if keeps else sum(sizes) == inputs
