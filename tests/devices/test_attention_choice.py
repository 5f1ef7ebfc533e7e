"""Backends of attention by layout, device and dtype, and what is kept from call to call."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import flex_attention as flex_module

from textdiff.config import Config
from textdiff.models import CAUSAL, FULL, Layout, TextDiffusionConfig, TextDiffusionModel
from textdiff.models.attention import Attention, attend, prepare
from textdiff.models.cpu_kernels import rotate
from textdiff.models.sliding_window import windowed

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")
BLOCKS = Layout("block_diffusion", 4)
DOCUMENTS = FULL.within(torch.zeros(2, 16, dtype=torch.int64))


@pytest.mark.parametrize(
    ("backend", "layout", "device", "gradients", "expected"),
    [
        ("flex_attention", FULL, CPU, False, "sdpa"),  # there is nothing to skip
        ("flex_attention", BLOCKS, ELSEWHERE, False, "sdpa"),  # other lengths every time
        ("flex_attention", BLOCKS, CPU, True, "flex_attention"),
        ("flash_attention_2", DOCUMENTS, CPU, False, "sdpa"),
        ("flash_attention_2", BLOCKS, CPU, False, "sdpa"),
    ],
)
def test_a_backend_runs_where_it_pays(backend, layout, device, gradients, expected):
    with torch.set_grad_enabled(gradients):
        found = prepare(backend, layout, torch.empty(2, 16 * layout.streams, device=device))
    assert found.backend == expected


def test_left_to_right_needs_no_mask_on_a_gpu():
    assert prepare("sdpa", CAUSAL, torch.empty(2, 16)).mask is not None  # as it was computed so far
    causal = prepare("sdpa", CAUSAL, torch.empty(2, 16, device=ELSEWHERE))
    assert (causal.causal, causal.mask) == (True, None)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).double()
    expected = attend(prepare("eager", CAUSAL, torch.empty(2, 16)), q, k, v)
    torch.testing.assert_close(attend(causal, q, k, v), expected)
    there = Attention("sdpa", causal=True, layout=CAUSAL, total=16, device=CPU)
    narrow = windowed(there, 3, both_sides=False)
    expected = attend(windowed(prepare("eager", CAUSAL, torch.empty(2, 16)), 3, False), q, k, v)
    torch.testing.assert_close(attend(narrow, q, k, v), expected)


def test_block_masks_are_made_once(monkeypatch):
    make, made = flex_module.create_block_mask, []

    def counted(*arguments, **options):
        made.append(arguments)
        return make(*arguments, **options)

    monkeypatch.setattr(flex_module, "create_block_mask", counted)
    layout = Layout("block_diffusion", 2)
    first, second = (prepare("flex_attention", layout, torch.empty(2, 24)) for _ in range(2))
    assert first.mask is second.mask
    assert first.noisy is second.noisy
    assert len(made) == 2
    other = prepare("flex_attention", Layout("block_diffusion", 3), torch.empty(2, 24))
    assert other.mask is not first.mask
    assert len(made) == 4


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
    Config.model_validate({"model": FLASH, "data": {"document_mask": True}})
