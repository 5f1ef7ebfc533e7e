"""Fused CPU kernels against the plain equations, forward and backward."""

import pytest
import torch
from torch.nn import functional

from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel, cpu_kernels
from textdiff.models.attention import attend, prepare
from textdiff.models.sliding_window import windowed

ROWS, LENGTH, HEADS, SIZE = 3, 12, 2, 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks small enough that every kernel takes several, the last one shorter."""
    monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", 8 * 100)
    torch.manual_seed(0)


def tensors(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def forward_and_gradients(function, *inputs):
    """What a function returns and its gradients under fixed random cotangents."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    total = sum((w * o.double()).sum() for w, o in zip(weights, outputs, strict=True))
    return [*outputs, *torch.autograd.grad(total, inputs)]


def assert_agree(found, wanted, tolerance):
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


class TestRotate:
    def angles(self):
        at = torch.arange(LENGTH, dtype=torch.float64)[:, None]
        turns = at * 0.3 ** torch.arange(SIZE // 2)
        return turns.cos(), turns.sin()

    def tables(self):
        cos, sin = self.angles()
        return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

    @pytest.mark.parametrize("chunk", [1, 2**20])
    def test_equals_the_complex_product(self, monkeypatch, chunk):
        monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", chunk)
        cos, sin = self.angles()
        (qkv,) = tensors((ROWS, LENGTH, 3, HEADS, SIZE))

        def plain(qkv):
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            turn = torch.complex(cos, sin)
            both = [torch.complex(*x.chunk(2, -1)) * turn for x in (q, k)]
            return *(torch.cat([x.real, x.imag], -1) for x in both), v

        found = forward_and_gradients(lambda x: cpu_kernels.rotate(x, *self.tables()), qkv)
        assert_agree(found, forward_and_gradients(plain, qkv), 1e-10)
        assert_agree(cpu_kernels.rotate(qkv.detach(), *self.tables()), plain(qkv), 1e-10)

    def test_equals_the_path_of_other_devices(self, monkeypatch):
        (qkv,) = tensors((ROWS, LENGTH, 3, HEADS, SIZE))
        found = forward_and_gradients(lambda x: cpu_kernels.rotate(x, *self.tables()), qkv)
        monkeypatch.setattr(cpu_kernels, "applies", lambda x: False)
        wanted = forward_and_gradients(lambda x: cpu_kernels.rotate(x, *self.tables()), qkv)
        assert_agree(found, wanted, 1e-10)


class TestDropoutAdd:
    def test_gradients_use_the_mask_of_the_forward_pass(self):
        x, h = tensors((ROWS, LENGTH, 9), (ROWS, LENGTH, 9))
        out = cpu_kernels.dropout_add(x, h, 0.25, True)
        factor = ((out - x) / h).detach()  # 0 or 1 / (1 - p)
        grad_x, grad_h = torch.autograd.grad(out, (x, h), torch.ones_like(out))
        torch.testing.assert_close(grad_h, factor, rtol=1e-10, atol=1e-10)
        assert torch.equal(grad_x, torch.ones_like(x))
        assert set(factor.round(decimals=9).unique().tolist()) == {0.0, round(4 / 3, 9)}

    @pytest.mark.parametrize("p", [0.1, 0.25, 1 / 3, 0.9])
    def test_scale_makes_the_quantised_mask_unbiased(self, p):
        dropped = round(p * 65536)
        out = cpu_kernels.dropout_add(torch.zeros(50_000), torch.ones(50_000), p, True)
        kept = out > 0
        torch.testing.assert_close(
            out[kept].double(), torch.full((int(kept.sum()),), 65536 / (65536 - dropped)).double()
        )
        deviation = (p * (1 - p) / 50_000) ** 0.5
        assert abs(kept.double().mean().item() - (1 - p)) < 4 * deviation
        assert abs(out.double().var().item() - p / (1 - p)) < 0.15 * p / (1 - p)

    def test_every_bit_is_random(self):
        """Masks of neighbours, which share a 64-bit word, are independent and alike."""
        kept = cpu_kernels.dropout_add(torch.zeros(400_000), torch.ones(400_000), 0.5, True) > 0
        kept = kept.view(-1, 4).double()
        assert (kept.mean(0) - 0.5).abs().max() < 0.01
        assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 0.02

    def test_seed_reproduces(self):
        x, h = tensors((40,), (40,))
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(cpu_kernels.dropout_add(x, h, 0.5, True))
        assert torch.equal(outs[0], outs[1])
        assert not torch.equal(outs[0], outs[2])

    @pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
    def test_adds_when_there_is_nothing_to_drop(self, p, training):
        x, h = tensors((40,), (40,))
        assert torch.equal(cpu_kernels.dropout_add(x, h, p, training), x + h)

    def test_drops_everything_at_one(self):
        x, h = tensors((40,), (40,))
        assert torch.equal(cpu_kernels.dropout_add(x, h, 1.0, True), x)

    def test_keeps_a_float32_stream_under_a_bfloat16_branch(self):
        (x,) = tensors((64,), dtype=torch.float32)
        (h,) = tensors((64,), dtype=torch.bfloat16)
        out = cpu_kernels.dropout_add(x, h, 0.25, True)
        assert out.dtype == torch.float32
        grad_x, grad_h = torch.autograd.grad(out.sum(), (x, h))
        assert (grad_x.dtype, grad_h.dtype) == (torch.float32, torch.bfloat16)


IDS = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [-1] * 4, [2] * 12])
LAYOUTS = [
    Layout(kind, 4 if kind.startswith("block") else None, ids)
    for kind in ("full", "causal", "block_causal", "block_diffusion")
    for ids in (None, IDS)
]


def named(layout):
    return layout.kind + ("" if layout.document_ids is None else "-documents")


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
class TestAttention:
    def run(self, layout, backend, dtype):
        torch.manual_seed(3)
        total = LENGTH * layout.streams
        inputs = [x.to(dtype) for x in torch.randn(3, ROWS, HEADS, total, SIZE).double()]
        attention = prepare(backend, layout, torch.empty(ROWS, total))
        return forward_and_gradients(
            lambda *qkv: attend(attention, *qkv), *(x.requires_grad_() for x in inputs)
        )

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)]
    )
    def test_backends_agree(self, layout, dtype, tolerance):
        found, wanted = self.run(layout, "sdpa", dtype), self.run(layout, "eager", dtype)
        assert_agree(found, wanted, tolerance)

    @pytest.mark.parametrize("pieces", [1, 3, 100])
    def test_half_precision_kernel_is_exact_in_float64(self, monkeypatch, layout, pieces):
        """Its equations do not depend on the precision, so they are checked where that is sharp."""
        total = LENGTH * layout.streams
        monkeypatch.setattr(cpu_kernels, "CHUNK_BYTES", pieces * 8 * total * total)
        torch.manual_seed(4)
        inputs = tensors(*[(ROWS, HEADS, total, SIZE)] * 3)
        mask = layout.mask(total, torch.device("cpu"))
        found = forward_and_gradients(lambda *x: cpu_kernels.half_attention(*x, mask), *inputs)
        wanted = forward_and_gradients(
            lambda *x: functional.scaled_dot_product_attention(*x, attn_mask=mask), *inputs
        )
        assert_agree(found, wanted, 1e-10)

    def test_bfloat16_is_close_to_float64(self, layout):
        found, wanted = (
            self.run(layout, "sdpa", torch.bfloat16),
            self.run(layout, "eager", torch.float64),
        )
        for left, right in zip(found, wanted, strict=True):
            assert (left.double() - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize("layout", [Layout(), Layout("causal"), Layout("block_diffusion", 4)])
def test_windows_train_in_half_precision_some_rows_at_a_time(layout):
    total = LENGTH * layout.streams
    inputs = [x.bfloat16() for x in torch.randn(3, ROWS, HEADS, total, SIZE)]
    results = []
    for backend, dtype in (("sdpa", torch.bfloat16), ("eager", torch.float64)):
        narrow = windowed(prepare(backend, layout, torch.empty(ROWS, total)), 3, both_sides=True)
        results.append(
            forward_and_gradients(
                lambda *qkv, to=narrow: attend(to, *qkv),
                *(x.to(dtype).requires_grad_() for x in inputs),
            )
        )
    for left, right in zip(*results, strict=True):
        assert (left.double() - right).norm() < 0.03 * right.norm()


def network(**settings):
    torch.manual_seed(5)
    config = TextDiffusionConfig(
        vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **settings
    )
    model = TextDiffusionModel(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def step(model, precision="fp32"):
    torch.manual_seed(6)
    ids = torch.randint(0, 11, (ROWS, LENGTH))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(ids).logits
    logits.double().square().mean().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


VARIANTS = [{}, {"qk_norm": True}, {"adaln": True}, {"mlp": "swiglu", "norm": "rmsnorm"}]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
class TestNetwork:
    def test_is_the_network_of_other_devices(self, monkeypatch, settings):
        model = network(**settings).double()
        found = step(model)
        monkeypatch.setattr(cpu_kernels, "applies", lambda x: False)
        assert_agree(found, step(model), 1e-10)

    def test_bfloat16_is_close_to_float32(self, settings):
        model = network(**settings)
        for left, right in zip(step(model, "bf16"), step(model), strict=True):
            assert (left - right).norm() < 0.05 * right.norm() + 1e-6

    def test_checkpointing_repeats_the_same_dropout(self, settings):
        model = network(dropout=0.3, **settings).double()
        found = step(model)
        model.gradient_checkpointing = True
        assert_agree(found, step(model), 1e-10)

    def test_inference_equals_training_without_dropout(self, settings):
        model = network(dropout=0.3, **settings).double().eval()
        wanted = step(model)[0]
        with torch.no_grad():
            torch.testing.assert_close(step_logits(model), wanted, rtol=1e-10, atol=1e-10)


def step_logits(model):
    torch.manual_seed(6)
    return model(torch.randint(0, 11, (ROWS, LENGTH))).logits


@pytest.mark.slow
def test_compiled_blocks_train():
    model = network()
    wanted = step(model)
    for block in model.blocks:
        block.compile()
    assert_agree(step(model), wanted, 1e-4)
