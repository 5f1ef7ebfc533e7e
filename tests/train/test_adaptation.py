"""Language models of transformers as first weights: rows, refusals, exports and resumption."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from refusals import refused
from safetensors.torch import load_file
from small_tokenizers import bpe
from tiny_backbones import write_backbone
from training_runs import assert_same_curve
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from textdiff.cli import main
from textdiff.config import Config
from textdiff.config.reading import validate
from textdiff.data.tokenizer import pretrained_tokenizer
from textdiff.errors import CheckpointError, ConfigError, TextDiffError
from textdiff.models import Layout
from textdiff.pipeline import TextDiffusion
from textdiff.train.initial_weights import initial_network, token_notes
from textdiff.train.optim import build_optimizers
from textdiff.train.setup import model_config

LENGTH = 16


def adaptation(folder: Path | str, **sections) -> Config:
    train = {"init_from": f"hf:{folder}", **sections.pop("train", {})}
    data = {"sequence_length": LENGTH}
    return validate({"data": data, "diffusion": {"block_size": 4}, "train": train, **sections})


def first_network(config: Config):
    tokenizer = pretrained_tokenizer(config.tokenizer.path)
    torch.manual_seed(config.run.seed)
    return initial_network(config, model_config(config, tokenizer), tokenizer), tokenizer


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_get_average_rows_and_the_others_keep_theirs(tmp_path, tied):
    folder = write_backbone(tmp_path, tie_word_embeddings=tied, dtype=torch.bfloat16)
    denoiser, tokenizer = first_network(adaptation(folder))
    before = load_file(folder / "model.safetensors")
    rows = len(before["model.embed_tokens.weight"])
    assert tokenizer.mask_token_id == rows
    names = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in names:
        old, new = before[name].float(), denoiser.network.state_dict()[name]
        assert new.dtype == torch.float32
        assert torch.equal(new[:rows], old)
        torch.testing.assert_close(new[rows:], old.mean(0, keepdim=True))
    layer = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(denoiser.network.state_dict()[layer], before[layer].float())
    head, embedding = denoiser.network.lm_head, denoiser.network.model.embed_tokens
    assert (head.weight is embedding.weight) == tied


def test_an_embedding_with_spare_rows_does_not_grow(tmp_path):
    folder = write_backbone(tmp_path, "qwen3", rows=9)
    config = adaptation(folder)
    denoiser, tokenizer = first_network(config)
    before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    after = denoiser.network.state_dict()["model.embed_tokens.weight"]
    mask, named = tokenizer.mask_token_id, len(tokenizer)
    assert len(after) == len(before) == denoiser.config.vocab_size == named + 8
    torch.testing.assert_close(after[mask], before[:mask].mean(0))  # without the spare rows
    assert set(range(named, named + 8)) <= set(denoiser.config.excluded_token_ids)
    family_ids = TextDiffusion(denoiser, tokenizer, built_family(denoiser)).family
    assert int(family_ids.process.vocabulary.ids.max()) < mask


def built_family(denoiser):
    from textdiff.export.loading import family_of

    return family_of(denoiser.config, torch.device("cpu"), denoiser.exponents)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_mask_of_its_own_is_kept(tmp_path, kind):
    folder = write_backbone(tmp_path, kind)
    config = adaptation(folder)
    denoiser, tokenizer = first_network(config)
    assert list(token_notes(config, tokenizer)) == []
    before = load_file(folder / "model.safetensors")
    after = denoiser.network.state_dict()
    assert denoiser.config.mask_token_id == AutoTokenizer.from_pretrained(folder).mask_token_id
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_padding_is_never_the_end_of_text(tmp_path):
    folder = write_backbone(tmp_path)
    tokenizer = bpe()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = adaptation(folder)
    denoiser, tokenizer = first_network(config)
    assert denoiser.config.pad_token_id != denoiser.config.eos_token_id
    assert denoiser.network.get_input_embeddings().padding_idx != denoiser.config.eos_token_id
    assert denoiser.config.pad_token_id in denoiser.config.excluded_token_ids
    assert denoiser.config.eos_token_id not in denoiser.config.excluded_token_ids
    notes = list(token_notes(config, tokenizer))
    assert ["<|mask|>" in notes[0], "<|pad|>" in notes[1]] == [True, True]


def test_a_mask_that_is_added_is_no_token_that_was_there(tmp_path):
    folder = write_backbone(tmp_path, rows=1)
    tokenizer = bpe()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mask|>"]})
    tokenizer.save_pretrained(folder)
    assert pretrained_tokenizer(str(folder)).mask_token == "<|mask_2|>"


def test_random_weights_of_an_architecture(tmp_path):
    folder = write_backbone(tmp_path)
    raw = {"model": {"kind": "transformers", "path": str(folder)}}
    config = validate({"data": {"sequence_length": LENGTH}, **raw})
    vocabulary = 300
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = config.model.configuration(
            vocabulary, LENGTH, {"block_size": 4}, mask_token_id=299, excluded_token_ids=[298]
        )
        denoiser = config.model.build(built)
    assert denoiser.network.get_input_embeddings().weight.shape == (300, 32)
    assert (denoiser.context, denoiser.config.excluded_token_ids) == (LENGTH, [298])
    before = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(denoiser.network.model.layers[0].mlp.down_proj.weight, before)


# --- refusals ------------------------------------------------------------------------------------


def edited(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def larger_tokenizer(folder: Path) -> Path:
    tokenizer = bpe()
    tokenizer.add_tokens(["dog", "horse"])
    write_backbone(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_head(folder: Path) -> Path:
    write_backbone(folder, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    return edited(folder, architectures=["LlamaForCausalLM"])


def gguf(folder: Path) -> Path:
    write_backbone(folder)
    (folder / "config.json").unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")
    return folder


def pickled(folder: Path) -> Path:
    write_backbone(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1), "b": Path("x")}, folder / "pytorch_model.bin")
    return folder


RECURRENT = {"state_size": 4, "expand": 2}
CASES = {
    "tokenizer_larger": (larger_tokenizer, ConfigError, ["2 tokens", "'dog'"]),
    "missing_weights": (without_head, CheckpointError, ["lm_head.weight"]),
    "gguf": (gguf, CheckpointError, ["GGUF", "convert them"]),
    "needs_unpickling": (pickled, CheckpointError, ["run code", "safetensors"]),
    "quantized": (
        lambda folder: edited(write_backbone(folder), quantization_config={"quant_method": "awq"}),
        CheckpointError,
        ["quantised", "take the model that it was made from"],
    ),
    "remote_code": (
        lambda folder: edited(
            write_backbone(folder), model_type="new", auto_map={"AutoModel": "new.New"}
        ),
        CheckpointError,
        ["'new'", "never run"],
    ),
    "no_language_model": (
        lambda folder: edited(write_backbone(folder), model_type="vit"),
        CheckpointError,
        ["'vit'"],
    ),
    "unsupported_network": (
        lambda folder: write_backbone(folder, "mamba", **RECURRENT),
        ConfigError,
        ["Mamba"],
    ),
    "too_long": (
        lambda folder: write_backbone(folder, max_position_embeddings=8),
        ConfigError,
        ["sequence_length 16", "8 positions"],
    ),
}


@pytest.mark.parametrize("code", CASES)
def test_refusals_are_one_sentence(tmp_path, code):
    make, kind, words = CASES[code]
    folder = make(tmp_path / "model")
    with refused(kind, code, str(folder), *words):
        first_network(adaptation(folder))


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_the_hub_offline(name, monkeypatch):
    with refused(TextDiffError, "hub", repr(name), "give a local folder"):
        adaptation(name).model.configuration(9, 8, {})


def test_code_beside_a_known_architecture_is_ignored(tmp_path):
    folder = edited(write_backbone(tmp_path), auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    denoiser, _ = first_network(adaptation(folder))
    denoiser.save_pretrained(tmp_path / "copy")
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())


# --- training ------------------------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_layers(tmp_path):
    config = adaptation(write_backbone(tmp_path), train={"optimizer": "muon"})
    denoiser, _ = first_network(config)
    adamw, muon = build_optimizers(denoiser, config.train)
    names = {id(p): name for name, p in denoiser.named_parameters()}
    taken = {names[id(p)] for p in muon.param_groups[0]["params"]}
    others = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert len(taken) == 2 * 7
    assert all(".layers." in name for name in taken)
    assert others == set(names.values()) - taken
    assert "network.model.embed_tokens.weight" in others


CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 16, cache_dir: {folder}/cache}}
diffusion: {diffusion}
model: {{kind: transformers, noise_embedding: {noise}}}
train: {{steps: 4, global_batch_size: 4, micro_batch_size: 2, warmup_steps: 2, log_every: 1,
         mixed_precision: fp32, checkpoint_every: 2, init_from: "hf:{model}"}}
evaluate: {{every: 4}}
sample: {{num_samples: 1, steps: 2, max_new_tokens: 8}}
"""
BLOCKS = "{block_size: 4}"
NOISY = "{process: uniform, objective: {kind: udlm}}"


def config_file(folder: Path, model: Path, diffusion: str = BLOCKS, noise: str = "false") -> str:
    corpus, path = folder / "corpus.txt", folder / "c.yaml"
    corpus.write_text("".join(f"the cat sat {i} times.\n" for i in range(200)))
    path.write_text(
        CONFIG.format(corpus=corpus, folder=folder, diffusion=diffusion, noise=noise, model=model)
    )
    return str(path)


def test_an_adapted_model_is_resumed_exactly_and_exported_as_an_ordinary_folder(tmp_path, capsys):
    path = config_file(tmp_path, write_backbone(tmp_path / "model", tie_word_embeddings=True))
    assert main(["train", path, f"--run.dir={tmp_path}/whole"]) == 0
    assert main(["train", path, f"--run.dir={tmp_path}/cut", "--train.steps=2"]) == 0
    assert main(["train", path, f"--run.dir={tmp_path}/cut"]) == 0
    exports = [tmp_path / name / "export" for name in ("whole", "cut")]
    whole, cut = (load_file(export / "model.safetensors") for export in exports)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    stock = AutoModelForCausalLM.from_pretrained(exports[0]).eval()
    ours = TextDiffusion.from_pretrained(exports[0])
    assert stock.config.diffusion["block_size"] == 4
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    ids = torch.tensor([ours.tokenizer.encode("the cat sat 7 times.")])
    with torch.no_grad():
        found = ours.model(ids, layout=Layout("causal")).logits
        torch.testing.assert_close(found, stock(ids).logits)
    assert ours.generate("the cat", num_samples=1, max_new_tokens=8).texts[0].startswith("the cat")


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_noise_levels_enter_where_the_process_needs_them(tmp_path, kind, capsys):
    path = config_file(tmp_path, write_backbone(tmp_path / "model", kind), NOISY, "true")
    assert main(["train", path, f"--run.dir={tmp_path}/run"]) == 0
    model = TextDiffusion.from_pretrained(tmp_path / "run").model
    ids = torch.zeros(1, 4, dtype=torch.int64)
    low, high = (model(ids, sigma=torch.tensor([s])).logits for s in (0.1, 2.0))
    assert not torch.equal(low, high)  # the embedding started at zero
    auto = AutoModelForMaskedLM if kind == "modernbert" else AutoModelForCausalLM
    export = tmp_path / "run" / "export"
    assert auto.from_pretrained(export).config.diffusion["noise_embedding"]
    network = {"kind": "transformers", "noise_embedding": True}
    noisy = adaptation(export, model=network, diffusion=yaml.safe_load(NOISY))
    carried, _ = first_network(noisy)
    assert torch.equal(carried(ids, sigma=torch.tensor([2.0])).logits, high)
    with refused(ConfigError, "misfit", "noise_embedding", str(export)):
        first_network(adaptation(export))


def test_a_run_continues_from_an_export_of_its_architecture(tmp_path, capsys):
    model = write_backbone(tmp_path / "model")
    path = config_file(tmp_path, model)
    assert main(["train", path, f"--run.dir={tmp_path}/first"]) == 0
    export = tmp_path / "first" / "export"
    taken = [f"--model.path={export}", f"--tokenizer.path={export}", "--tokenizer.kind=pretrained"]
    words = [path, f"--train.init-from={export}", "--train.steps=1", "--train.learning-rate=1e-30"]
    assert main(["train", *words, *taken, f"--run.dir={tmp_path}/more"]) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (export, tmp_path / "more/export")
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    other = write_backbone(tmp_path / "other", intermediate_size=40)
    capsys.readouterr()
    taken[0] = f"--model.path={other}"
    assert main(["train", *words, *taken, f"--run.dir={tmp_path}/wrong"]) == 2
    assert "does not fit the model section" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("optimizer", "rel", "apart"),
    [("adamw", 2e-5, 1e-6), ("muon", 1e-2, 3e-2)],  # Muon multiplies in bfloat16 where it can
    ids=["adamw", "muon"],
)
def test_two_processes_adapt_as_one_does_sharded_or_not(runs, tmp_path, optimizer, rel, apart):
    folder = write_backbone(tmp_path, tie_word_embeddings=True)
    flags = [
        f'--model={{"kind": "transformers", "path": "{folder}"}}',
        f'--tokenizer={{"kind": "pretrained", "path": "{folder}"}}',
        f"--train.init-from=hf:{folder}",
        f"--train.optimizer={optimizer}",
        "--diffusion.block-size=4",
        "--train.steps=8",
        "--evaluate.every=8",
    ]
    expected = runs.train(f"adapted-{optimizer}", *flags)
    copied, sharded = (f"adapted-{optimizer}-{way}" for way in ("copied", "sharded"))
    found = runs.launch(copied, "cpu", *flags, "--train.micro-batch-size=4")
    assert_same_curve(found, expected, rel)
    found = runs.launch_sharded(sharded, "fsdp2", *flags, "--train.micro-batch-size=4")
    assert_same_curve(found, expected, rel)
    assert json.loads((runs / sharded / "env.json").read_text())["sharded"] is True
    one = load_file(runs / f"adapted-{optimizer}" / "export" / "model.safetensors")
    for name in (copied, sharded):
        two = load_file(runs / name / "export" / "model.safetensors")
        assert list(two) == list(one)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=apart, msg=key)
