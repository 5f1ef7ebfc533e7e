"""Inference in bfloat16 with a head and norms in float32, as `auto` means it on a GPU."""

import pytest
import torch
from tiny_models import CLEAN, tiny_family, tiny_model, tiny_pipeline
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from textdiff.evaluate.bound_record import evaluation_record
from textdiff.export import loading
from textdiff.models import CAUSAL, Denoiser, Layout
from textdiff.models.backbone import TransformersDenoiser
from textdiff.models.half_blocks import dtype_name, halve_blocks, is_norm
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.engine import Engine
from textdiff.sampling.job import Job
from textdiff.sampling.request import Request
from textdiff.sampling.settings import SamplingConfig

OWN = {
    "plain": {"norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu"},
    "levels": {"adaln": True, "time_conditioning": True},
}
SIZES = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "n_embd": 16, "n_head": 2,
    "n_layer": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def network(name: str) -> Denoiser:
    if name in OWN:
        return tiny_model(**OWN[name]).float()
    torch.manual_seed(0)
    return TransformersDenoiser(AutoConfig.for_model(name, **SIZES)).eval()


@pytest.mark.parametrize("name", [*OWN, "qwen3", "gpt2", "bert"])
@torch.no_grad()
def test_norms_and_head_compute_in_float32(name):
    denoiser = network(name)
    torch.manual_seed(1)
    ids = torch.randint(5, 9, (2, 8))
    layout = CAUSAL if name in ("qwen3", "gpt2") else Layout()
    sigma = torch.full((2, 1), 0.7)
    expected = denoiser(ids, sigma=sigma, layout=layout).logits
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "matrix": set()}
    halve_blocks(denoiser)
    for block in denoiser.blocks:
        for module in block.modules():
            kind = "norm" if is_norm(module) else "matrix"
            if is_norm(module) or isinstance(module, nn.Linear | Conv1D):
                module.register_forward_pre_hook(
                    lambda _, inputs, kind=kind: seen[kind].add(inputs[0].dtype)
                )
    found = denoiser(ids, sigma=sigma, layout=layout).logits
    assert seen == {"norm": {torch.float32}, "matrix": {torch.bfloat16}}
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())  # products of the head in float32, too
    assert (found - expected).norm() < 0.04 * expected.norm()
    assert dtype_name(denoiser) == "bfloat16, float32 head and norms"
    assert denoiser.new_cache(1, 4).store.dtype == torch.bfloat16


def test_generation_with_a_cache_runs_on_such_a_network():
    denoiser = halve_blocks(tiny_model(**OWN["levels"]).float())
    job = Job([[CLEAN[0]], []], [8, 8])
    *_, last = Engine(denoiser, tiny_family(4), Request(job, SamplingConfig(steps=4))).run()
    written = [*last.canvas[0].tolist(), *last.canvas[1, :8].tolist()]
    assert set(written) <= set(CLEAN)


def test_auto_is_float32_on_a_cpu_and_both_on_a_gpu(tmp_path, monkeypatch):
    texts = ["the cat sat", "a dog"]
    tiny_pipeline("byte", 16, texts).save_pretrained(tmp_path)
    plain = TextDiffusion.from_pretrained(tmp_path, "cpu")
    assert {p.dtype for p in plain.model.parameters()} == {torch.float32}
    assert not loading.halves_blocks("auto", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert loading.halves_blocks("auto", torch.device("cuda"))
    assert not loading.halves_blocks("float32", torch.device("cuda"))
    monkeypatch.setattr("textdiff.pipeline.halves_blocks", lambda *_: True)
    half = TextDiffusion.from_pretrained(tmp_path, "cpu")
    dtypes = {"float32": plain, "bfloat16, float32 head and norms": half}
    for name, model in dtypes.items():
        estimates = model.estimate(texts, replicates=8)
        assert evaluation_record(model, estimates, {})["dtype"] == name
