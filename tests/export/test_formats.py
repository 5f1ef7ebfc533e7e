"""Models as folders for other programs, and their upload."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from refusals import refused
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from textdiff.cli import main
from textdiff.data.sections import ByteTokenizer
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.loading import family_of
from textdiff.models import FULL, Layout
from textdiff.models.backbone import TransformersDenoiser
from textdiff.pipeline import TextDiffusion
from textdiff.sampling.settings import SamplingConfig

IDS = torch.arange(12).view(1, 12) + 97


def small(kind: str = "qwen3", block_size: int | None = 4, **options) -> TextDiffusion:
    """A model of bytes on a random network."""
    tokenizer = ByteTokenizer().prepare([])
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 56,
        "max_position_embeddings": 64,
    }
    heads = {"head_dim": 12} if kind == "qwen3" else {}
    diffusion = {
        "process": "absorbing",
        "schedule": {"kind": "loglinear"},
        "objective": {"kind": "mdlm"},
        "block_size": block_size,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **sizes,
        **heads,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        excluded_token_ids=[],
        diffusion=diffusion | options.pop("diffusion", {}),
        **options,
    )
    model = TransformersDenoiser(config).eval()
    family = family_of(model.config, torch.device("cpu"))
    defaults = SamplingConfig(rule="threshold", knobs={"threshold": 0.8}, temperature=0.7)
    return TextDiffusion(model, tokenizer, family, defaults)


@torch.no_grad()
def stock_logits(network, layout: Layout) -> Tensor:
    """Logits of transformers' own attention under the mask of a layout."""
    mask = layout.mask(12, torch.device("cpu"))
    allowed = torch.ones(12, 12, dtype=torch.bool) if mask is None else mask
    added = torch.zeros(1, 1, 12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min)
    network.set_attn_implementation("eager")
    return network(IDS, attention_mask=added).logits


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
def test_exports_are_ordinary_folders_of_their_architecture(kind, tmp_path):
    held = small(kind, None)
    held.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == kind
    assert "auto_map" not in config
    assert not list(tmp_path.glob("*.py"))
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        ours = held.model(IDS).logits
    assert torch.allclose(stock_logits(network, FULL), ours, atol=1e-5)
    again = TextDiffusion.from_pretrained(tmp_path, "cpu")
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, ours)
    assert again.defaults == held.defaults
    assert again.family.block_size is None


@pytest.mark.parametrize("tied", [False, True])
def test_sdar_folders_reload_as_qwen3_with_the_same_logits(tied, tmp_path, capsys):
    held = small(tie_word_embeddings=tied, rope_theta=5e5)
    held.save_pretrained(tmp_path / "export")
    words = [str(tmp_path / "export"), str(tmp_path / "sdar"), "--format", "sdar"]
    assert main(["export", *words]) == 0
    folder, shown = tmp_path / "sdar", capsys.readouterr().out
    assert "--dllm-algorithm LowConfidence" in shown
    assert "id 258" in shown  # a mask that SGLang does not expect
    network = Qwen3ForCausalLM.from_pretrained(folder)
    layout = Layout("block_causal", 4)
    with torch.no_grad():
        ours = held.model(IDS, layout=layout).logits
    assert torch.allclose(stock_logits(network, layout), ours, atol=1e-5)
    assert yaml.safe_load((folder / "sglang.yaml").read_text()) == {
        "block_size": 4,
        "threshold": 0.8,
    }
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["temperature"] == 0.7
    assert generation["eos_token_id"] == held.tokenizer.eos_token_id


def test_sdar_folders_have_the_config_that_servers_read(tmp_path, monkeypatch):
    """SGLang loads it with trust_remote_code, and reads `rope_theta` where version 4 had it."""
    small(rope_theta=5e5).save_pretrained(tmp_path, "sdar")
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert config.model_type == "sdar"
    assert config.architectures == ["SDARForCausalLM"]
    assert (config.rope_theta, config.head_dim, config.block_size) == (5e5, 12, 4)
    assert config.mask_token_id == 258
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "llama"}, "'llama'"),
        ({"block_size": None}, "whole sequences"),
        ({"diffusion": {"objective": {"kind": "mdlm", "shift": True}}}, "next token"),
        ({"diffusion": {"objective": {"kind": "sedd"}}}, "sedd"),
        ({"diffusion": {"noise_embedding": True}}, "noise level"),
    ],
)
def test_other_shapes_are_refused_as_sdar(options, word, tmp_path):
    with refused(CheckpointError, "not_sdar", word):
        small(**options).save_pretrained(tmp_path / "out", "sdar")


def test_an_unknown_format_and_a_full_folder_are_refused(tmp_path):
    with refused(ConfigError, "unknown_format", "sdar, textdiff"):
        small().save_pretrained(tmp_path, "gguf")
    (tmp_path / "file").touch()
    assert main(["export", "nowhere", str(tmp_path)]) == 2
    assert (tmp_path / "file").exists()


class Hub:
    """The functions of `HfApi` that an upload calls."""

    files: frozenset[str] = frozenset()

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> object:
        assert exist_ok
        assert private
        return SimpleNamespace(repo_id=f"owner/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        from pathlib import Path

        assert repo_id == "owner/name"
        assert commit_message
        Hub.files = frozenset(path.name for path in Path(folder_path).iterdir())


@pytest.mark.parametrize(
    ("layout", "name"), [("textdiff", "model.safetensors"), ("sdar", "sglang.yaml")]
)
def test_a_model_is_uploaded_as_its_folder(layout, name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    small().push_to_hub("name", private=True, format=layout)
    assert {"config.json", "tokenizer.json", "generation_config.json", name} <= Hub.files


def test_an_upload_without_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with refused(CheckpointError, "not_uploaded", "owner/name"):
        small().push_to_hub("owner/name")
