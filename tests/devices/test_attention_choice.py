"""Backends of attention by layout, device and dtype, and what is kept from call to call."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex_module

from textdiff.config import Config
from textdiff.models import CAUSAL, FULL, Layout, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.attention import Attention, _flash, attend, prepare, windowed
from textdiff.models.cpu_kernels import rotate
from textdiff.train.setup import build_model

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
BLOCKS = Layout("block_diffusion", 4)
DOCUMENTS = FULL.within(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("backend", "layout", "device", "gradients", "expected"),
    [
        ("flex_attention", FULL, CPU, False, "sdpa"),  # there is nothing to skip
        ("flex_attention", BLOCKS, ELSEWHERE, False, "sdpa"),  # other lengths every time
        ("flex_attention", BLOCKS, CPU, True, "flex_attention"),
        ("flash_attention_2", CAUSAL, ELSEWHERE, False, "flash_attention_2"),
        ("flash_attention_2", DOCUMENTS, CPU, False, "sdpa"),
        ("flash_attention_2", BLOCKS, CPU, False, "sdpa"),
    ],
)
def test_a_backend_runs_where_it_pays(backend, layout, device, gradients, expected):
    with torch.set_grad_enabled(gradients):
        found = prepare(backend, layout, 16 * layout.streams, device, 2)
    assert found.backend == expected


def test_left_to_right_needs_no_mask_on_a_gpu():
    assert prepare("sdpa", CAUSAL, 16, CPU, 2).mask is not None  # as it was computed so far
    causal = prepare("sdpa", CAUSAL, 16, ELSEWHERE, 2)
    assert (causal.causal, causal.mask) == (True, None)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).double()
    expected = attend(prepare("eager", CAUSAL, 16, CPU, 2), q, k, v)
    torch.testing.assert_close(attend(causal, q, k, v), expected)
    there = Attention("sdpa", causal=True, layout=CAUSAL, total=16, device=CPU)
    narrow = windowed(there, 3, both_sides=False)
    expected = attend(windowed(prepare("eager", CAUSAL, 16, CPU, 2), 3, False), q, k, v)
    torch.testing.assert_close(attend(narrow, q, k, v), expected)


def test_block_masks_are_made_once(monkeypatch):
    make, made = flex_module.create_block_mask, []

    def counted(*arguments, **options):
        made.append(arguments)
        return make(*arguments, **options)

    monkeypatch.setattr(flex_module, "create_block_mask", counted)
    layout = Layout("block_diffusion", 2)
    first, second = (prepare("flex_attention", layout, 24, CPU, 2) for _ in range(2))
    assert first.mask is second.mask
    assert first.noisy is second.noisy
    assert len(made) == 2
    other = prepare("flex_attention", Layout("block_diffusion", 3), 24, CPU, 2)
    assert other.mask is not first.mask
    assert len(made) == 4


def test_flash_attention_computes_float32_by_another_kernel(monkeypatch):
    def flash(q, k, v, causal):
        assert q.dtype == torch.bfloat16
        return v

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash))
    q, k, v = torch.randn(3, 2, 2, 16, 8)
    attention = Attention("flash_attention_2", causal=True)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(_flash(attention, q, k, v), expected)
    half = v.bfloat16()
    assert torch.equal(_flash(attention, q.bfloat16(), k.bfloat16(), half), half)


def test_normalised_queries_have_the_dtype_of_values(monkeypatch):
    """Autocast of CUDA returns float32 from norms; that of CPUs does not."""
    config = TextDiffusionConfig(
        vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, qk_norm=True,
        max_position_embeddings=8, mask_token_id=10,
    )  # fmt: skip
    model, norm, seen = TextDiffusionModel(config).bfloat16().eval(), functional.rms_norm, []
    monkeypatch.setattr(functional, "rms_norm", lambda *a, **o: norm(*a, **o).float())
    monkeypatch.setattr(
        "textdiff.models.layers.rotate", lambda x, *a: seen.append(x.dtype) or rotate(x, *a)
    )
    model(torch.randint(0, 10, (2, 8)))
    assert seen == [torch.bfloat16]


FLASH = {"attn_implementation": "flash_attention_2"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"train": {"mixed_precision": "fp32"}}, "half precision"),
        ({"diffusion": {"block_size": 16}}, "no masks for blocks"),
        ({"diffusion": {"block_size": [16, None]}}, "no masks for blocks"),
        ({"data": {"document_mask": True}}, "document_mask"),
    ],
)
def test_flash_attention_is_refused_before_the_corpus_is_read(change, why):
    with pytest.raises(ValueError, match=why):
        Config.model_validate({"model": FLASH, **change})
    Config.model_validate({**change, "model": {}})


def test_flash_attention_trains_whole_sequences_and_left_to_right():
    Config.model_validate({"model": FLASH})
    left_to_right = {"objective": {"kind": "ar"}, "block_size": 1}
    Config.model_validate({"model": FLASH, "diffusion": left_to_right})


def test_auto_is_flex_attention_where_a_gpu_trains_in_blocks(monkeypatch):
    class Stop(Exception):
        pass

    def reached(backend, device, gradients):
        raise Stop(backend)

    monkeypatch.setattr("textdiff.train.setup.unavailable", reached)
    wanted = {"cuda": {None: "sdpa", 16: "flex_attention"}, "cpu": {None: "sdpa", 16: "sdpa"}}
    for device, backends in wanted.items():
        for size, backend in backends.items():
            config = Config.model_validate(
                {"model": {"attn_implementation": "auto"}, "diffusion": {"block_size": size}}
            )
            with pytest.raises(Stop, match=backend):
                build_model(config, None, torch.device(device))
    assert config.model.configuration(50, 128, {})._attn_implementation == "sdpa"
