"""Published names and settings of stock networks, on small random models made here."""

import json
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from small_tokenizers import bpe, wordpiece
from tiny_backbones import MASKED, write_backbone
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import logging

from textdiff import TextDiffusion, load_denoiser
from textdiff.cli import main
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.convert import CHECKPOINT_FAMILIES
from textdiff.export.convert.tokenizer_files import stored_mask
from textdiff.models import CAUSAL, FULL

IDS = torch.arange(12).view(1, 12)
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "head_dim": 8,
}
LLADA = {
    "model_type": "llada",
    "d_model": 16,
    "n_layers": 2,
    "n_heads": 2,
    "mlp_hidden_size": 24,
    "max_sequence_length": 32,
    "rms_norm_eps": 1e-6,
    "mask_token_id": 19,
}


def network(kind: str, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "tie_word_embeddings": False, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def logits(model) -> Tensor:
    """Logits of transformers' own attention without a mask."""
    return model(IDS, attention_mask=torch.zeros(1, 1, 12, 12)).logits


def write(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.detach().clone() for k, v in weights.items()}, folder / "model.safetensors")
    return folder


def settings(model, kind: str, **options) -> dict:
    return model.config.to_dict() | {"model_type": kind} | options


def same(folder: Path, expected: Tensor, family: str | None = None):
    """Load a folder, compare its logits on the rows that it has, and return its family."""
    model, found = load_denoiser(folder, family)
    with torch.no_grad():
        found_logits = model(IDS, layout=FULL).logits
    assert torch.allclose(found_logits[..., :20], expected, atol=1e-5)
    return found


def test_llada_has_names_of_its_own(tmp_path):
    model = network("llama", rms_norm_eps=1e-6)
    names = {
        "self_attn.o_proj": "attn_out",
        "self_attn.": "",
        "mlp.gate_proj": "ff_proj",
        "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "model.layers": "blocks",
        "model.embed_tokens": "wte",
        "model.norm": "ln_f",
        "lm_head": "ff_out",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[f"model.transformer.{name}"] = value
    family = same(write(tmp_path / "a", LLADA, weights), logits(model))
    assert family.process.mask_token_id == 19
    assert family.block_size is None
    with refused(CheckpointError, "wrong_setting", "alibi"):
        load_denoiser(write(tmp_path / "b", LLADA | {"alibi": True}, weights))


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_diffugpt_stores_a_tied_matrix_under_either_name(name, tmp_path):
    model = network("gpt2", tie_word_embeddings=True)
    weights = {
        key.replace("transformer.", "denoise_model."): value
        for key, value in model.state_dict().items()
        if key not in ("lm_head.weight", "transformer.wte.weight")
    }
    weights[name] = model.transformer.wte.weight
    family = same(write(tmp_path, settings(model, "gpt2"), weights), logits(model))
    assert family.objective.shift
    assert family.process.mask_token_id == 20  # a row is added: nothing says which it is
    chosen = same(tmp_path, logits(model), "diffugpt mask_token_id=7")
    assert chosen.process.mask_token_id == 7


@pytest.mark.parametrize(("name", "size"), [("SDAR-1.7B-Chat", 4), ("SDAR-1.7B-Chat-b16", 16)])
def test_sdar_blocks_are_in_the_name_and_the_mask_in_the_tokenizer(name, size, tmp_path):
    model = network("qwen3")
    folder = tmp_path / f"models--JetLM--{name}" / "snapshots"  # as the hub's cache has it
    folder.mkdir(parents=True)
    decoder = {"17": {"content": "<|MASK|>"}}
    tokenizer = {"mask_token": "<|MASK|>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "added_tokens.json").write_text('{"<MASK>": 17}')
    family = same(write(folder, settings(model, "sdar"), model.state_dict()), logits(model))
    assert family.block_size == size
    assert family.process.mask_token_id == 17


@pytest.mark.parametrize(
    ("name", "kind", "size"), [("x-mdlm-v0.1", "qwen3", None), ("x-bd3lm-v0.1", "qwen2", 32)]
)
def test_adapted_models_are_in_blocks_by_their_name(name, kind, size, tmp_path):
    model = network(kind)
    config = settings(model, f"a2d-{kind}")
    family = same(write(tmp_path / name, config, model.state_dict()), logits(model))
    assert family.block_size == size
    eight = same(tmp_path / name, logits(model), "a2d block_size=8 mask_token_id=3")
    assert (eight.block_size, eight.process.mask_token_id) == (8, 3)


def test_a_head_that_is_stored_though_tied_is_not_read(tmp_path):
    model = network("qwen3", tie_word_embeddings=True)
    weights = model.state_dict() | {"lm_head.weight": torch.zeros(20, 16)}
    same(write(tmp_path, settings(model, "a2d-qwen3"), weights), logits(model))


def test_llama_of_that_name_is_shifted(tmp_path):
    model = network("llama")
    config, weights = settings(model, "llama"), model.state_dict()
    assert same(write(tmp_path / "diffullama", config, weights), logits(model)).objective.shift
    config["mask_token_id"] = 11  # of another name it could be anything
    with refused(CheckpointError, "not_an_export", "diffullama"):
        load_denoiser(write(tmp_path / "llama", config, weights))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3_moe"])
def test_a_causal_language_model_has_its_own_likelihood(kind, tmp_path):
    folder = write_backbone(tmp_path / "model", kind, bos_token_id=1, **EXPERTS)
    denoiser, family = load_denoiser(folder)
    assert (family.objective.kind, family.block_size) == ("ar", 1)
    assert family.objective.first_input == 1
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        ours, theirs = denoiser(IDS, layout=CAUSAL).logits, model(IDS).logits
    rows = theirs.shape[-1]
    torch.testing.assert_close(ours[..., :rows], theirs, atol=1e-5, rtol=0)
    assert ours.shape[-1] == rows + 1  # the mask that it lacks
    assert family.process.mask_token_id == rows
    assert family.process.vocabulary.count == rows


@pytest.mark.parametrize("kind", MASKED)
def test_a_masked_language_model_fills_its_own_mask(kind, tmp_path):
    folder = write_backbone(tmp_path / "model", kind)
    denoiser, family = load_denoiser(folder)
    assert (family.process.name, family.objective.kind) == ("absorbing", "mdlm")
    assert family.block_size is None
    assert family.process.mask_token_id == wordpiece().mask_token_id
    model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    ids = IDS + 1  # RoBERTa gives its padding, id 0, no position
    with torch.no_grad():
        ours, theirs = denoiser(ids, layout=FULL).logits, model(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    first = 1 if kind == "roberta" else 0  # its positions count from after the padding id
    assert denoiser.context == model.config.max_position_embeddings - first


def test_language_models_are_scored_and_converted_with_their_tokenizers(tmp_path, capsys):
    """Spare rows serve mask and padding; as ids without a meaning they are never predicted."""
    folder = write_backbone(tmp_path / "model", "gpt2", rows=9, bos_token_id=260)
    text = "the cat sat at 7."
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), bpe()
    ids = torch.tensor([[260, *tokenizer.encode(text)]])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1, : len(tokenizer)]
    nats = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).mean()
    (tmp_path / "text.txt").write_text(text)
    assert main(["convert", str(folder), str(tmp_path / "export")]) == 0
    for name in ("model", "export"):
        capsys.readouterr()
        words = [str(tmp_path / name), str(tmp_path / "text.txt"), "--estimator=exact", "--json"]
        assert main(["perplexity", *words]) == 0
        assert json.loads(capsys.readouterr().out)["mean"] == pytest.approx(float(nats), abs=1e-6)
    loaded = TextDiffusion.from_pretrained(folder)
    assert loaded.model.config.vocab_size == len(tokenizer) + 9
    assert loaded.tokenizer.mask_token_id == len(tokenizer)
    assert loaded.family.process.vocabulary.count == len(tokenizer)
    export = load_file(tmp_path / "export" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert torch.equal(export[WEIGHT], before[WEIGHT])


WEIGHT = "transformer.h.1.mlp.c_fc.weight"


def test_loading_and_saving_show_no_bars_and_keep_the_caller_s(tmp_path, capfd):
    folder = write_backbone(tmp_path / "model")
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        load_denoiser(folder)[0].save_pretrained(tmp_path / "copy")
        assert logging.is_progress_bar_enabled()
    finally:
        if not before:
            logging.disable_progress_bar()
    assert "Loading weights" not in capfd.readouterr().err


def with_tokens(folder: Path, *tokens: str) -> Path:
    tokenizer = bpe()
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(write_backbone(folder))
    return folder


def changed(folder: Path, kind: str = "llama", **values) -> Path:
    path = write_backbone(folder, kind) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def without_tokenizer(folder: Path, kind: str) -> Path:
    for file in write_backbone(folder, kind).glob("*token*"):
        file.unlink()
    return folder


LANGUAGE_MODELS = {
    "tokenizer_does_not_fit": lambda folder: with_tokens(folder, "dog"),
    "quantized": lambda folder: changed(folder, quantization_config={"bits": 4}),
    "remote_code": lambda folder: changed(folder, model_type="new", auto_map={"AutoModel": "a.B"}),
    "unsupported_network": lambda folder: write_backbone(folder, "mamba", state_size=4, expand=2),
    "weights_do_not_fit": lambda folder: changed(folder, num_hidden_layers=3),
    "no_tokenizer": lambda folder: without_tokenizer(folder, "llama"),
    "no_mask": lambda folder: without_tokenizer(folder, "bert"),
}


@pytest.mark.parametrize("code", LANGUAGE_MODELS)
def test_language_models_that_cannot_be_used_are_refused(code, tmp_path):
    folder = LANGUAGE_MODELS[code](tmp_path / "model")
    with refused(CheckpointError, code, str(folder)):
        TextDiffusion.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "weights", "code", "word"),
    [
        ({"quantization_config": {"bits": 4}}, {}, "quantised", "bfloat16"),
        ({"mask_token_id": 30}, {}, "mask_beyond_rows", "20 rows"),
        ({"hidden_size": "wide"}, {}, "wrong_setting", "hidden_size"),
        ({}, {"extra.weight": torch.zeros(1)}, "weights_do_not_fit", "extra.weight"),
        ({"intermediate_size": 25}, {}, "weights_do_not_fit", "mlp"),
    ],
)
def test_what_does_not_fit_is_refused(config, weights, code, word, tmp_path):
    model = network("qwen2")
    content = settings(model, "Dream") | config
    folder = write(tmp_path, content, model.state_dict() | weights)
    with refused(CheckpointError, code, word):
        load_denoiser(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_gguf_weights_are_refused_with_a_way_out(tmp_path, file):
    write_backbone(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    for name in {file, "model.safetensors"}:
        (tmp_path / name).unlink()
    with refused(CheckpointError, "gguf", "gguf_file"):
        TextDiffusion.from_pretrained(tmp_path)


def test_a_network_that_fills_masks_is_not_read_from_left_to_right(tmp_path):
    write_backbone(tmp_path, "bert")
    with refused(CheckpointError, "wrong_family", "masked-lm"):
        load_denoiser(tmp_path, "causal-lm")


def test_an_unknown_option_of_a_family_is_refused(tmp_path):
    model = network("qwen2")
    folder = write(tmp_path, settings(model, "Dream"), model.state_dict())
    with refused(ConfigError, "extra_forbidden", "blocks"):
        load_denoiser(folder, "dream blocks=4")


def test_the_mask_of_tokenizer_files(tmp_path):
    assert stored_mask(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": {"content": "<m>"}}')
    assert stored_mask(tmp_path) is None
    backend = {"added_tokens": [{"id": 5, "content": "<m>"}], "model": {"vocab": {"<m>": 5}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    assert stored_mask(tmp_path) == 5


def test_every_stock_family_says_where_it_comes_from():
    for kind in ("llada", "dream", "sdar", "a2d", "diffugpt", "diffullama", "tiny-diffusion"):
        family = CHECKPOINT_FAMILIES[kind]
        assert family.repository.startswith("https://")
        assert family.published_mask is not None
