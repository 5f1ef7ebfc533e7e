"""Low-rank adapters: nothing at first, all that is trained, merged or beside their base."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from test_adaptation import adaptation, config_file
from tiny_backbones import write_backbone
from training_runs import assert_same_curve
from transformers import AutoModelForCausalLM

from textdiff.cli import main
from textdiff.config.reading import validate
from textdiff.data.tokenizer import pretrained_tokenizer
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.adapters import (
    add_adapters,
    frozen_parameters,
    merged_adapters,
    trained_parameters,
)
from textdiff.models import Layout, TextDiffusionConfig, TextDiffusionModel
from textdiff.pipeline import TextDiffusion
from textdiff.train.optim import build_optimizers
from textdiff.train.run_state import EMA
from textdiff.train.setup import build_model

PeftModel = pytest.importorskip("peft").PeftModel
CPU = torch.device("cpu")
LORA = {"rank": 3, "alpha": 6}
BLOCKS = Layout("block_diffusion", 4)


def adapted(folder: Path, **lora):
    config = adaptation(folder, train={"lora": LORA | lora})
    torch.manual_seed(0)
    return build_model(config, pretrained_tokenizer(str(folder)), CPU)


def own_network(**options) -> TextDiffusionModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "mask_token_id": 10}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    return TextDiffusionModel(TextDiffusionConfig(**(sizes | options))).eval()


def stirred(model):
    """The same network with adapters that are not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p), alpha=1.0 if "lora" in name else 5.0)
    return model


def logits(model, ids, streams: int = 1):
    with torch.no_grad():
        if streams == 1:
            return model(ids).logits
        return model(ids, context_ids=ids.flip(1), layout=BLOCKS).logits


OURS = [{"mlp": "gelu"}, {"mlp": "swiglu", "adaln": True}]


@pytest.mark.parametrize("options", OURS, ids=["gelu", "swiglu"])
def test_our_kernels_see_adapters(options):
    """In training, in evaluation and merged, in one stream and in two, the network is one."""
    model, lora = own_network(**options).double(), validate_lora()
    ids = torch.randint(0, 10, (3, 8))
    before = [logits(model, ids, streams) for streams in (1, 2)]
    add_adapters(model, lora)
    assert torch.equal(logits(model, ids), before[0])
    torch.testing.assert_close(logits(model, ids, 2), before[1], rtol=1e-12, atol=1e-12)
    stirred(model)
    for streams in (1, 2):
        expected = logits(model, ids, streams)
        assert not torch.allclose(expected, before[streams - 1], rtol=0.01)
        context = {"context_ids": ids.flip(1), "layout": BLOCKS} if streams == 2 else {}
        trained = model.train()(ids, **context).logits  # with gradients: the kernels' own passes
        torch.testing.assert_close(trained.detach(), expected, rtol=1e-12, atol=1e-12)
        model.eval()
        with merged_adapters(model):
            assert not any("lora" in name for name in model.state_dict())
            torch.testing.assert_close(
                logits(model, ids, streams), expected, rtol=1e-12, atol=1e-12
            )
        assert torch.equal(logits(model, ids, streams), expected)


def validate_lora(**keys):
    raw = {"train": {"init_from": "x", "lora": LORA | keys}}
    return validate(raw).train.lora


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_the_base_stays_and_adapters_and_the_added_row_are_trained(tmp_path, kind):
    folder = write_backbone(tmp_path, kind)
    tokenizer = pretrained_tokenizer(str(folder))
    plain, _ = build_model(adaptation(folder), tokenizer, CPU)
    config = adaptation(folder, train={"lora": LORA, "weight_decay": 0.1})
    model, _ = build_model(config, tokenizer, CPU)
    mask = model.config.mask_token_id
    ids = torch.randint(0, mask, (2, 8))
    ids[:, ::2] = mask
    for streams in (1, 2):
        assert torch.equal(logits(model, ids, streams), logits(plain, ids, streams))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, config.train)
    ema = EMA(model, 0.5)
    for _ in range(3):
        model(ids).logits[:, ::2].logsumexp(-1).sum().backward()
        assert not any(p.grad is not None for p in frozen_parameters(model).values())
        assert all(p.grad is not None for p in trained_parameters(model).values())
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        with ema.applied(model), merged_adapters(model):
            pass
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert same == set(frozen_parameters(model))
    assert all("lora_" in name or name.endswith(".rows") for name in set(before) - same)
    rows = [name for name in before if name.endswith(".rows")]
    assert [len(before[name]) for name in rows] == [1]
    expected = logits(model, ids)
    with merged_adapters(model):
        torch.testing.assert_close(logits(model, ids)[..., :mask], expected[..., :mask])
    assert torch.equal(logits(model, ids), expected)


# --- runs ----------------------------------------------------------------------------------------

UNMERGED = "--train.lora={rank: 3, merge: false}"


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run that leaves its adapters beside their base, and the words of the run."""
    folder = tmp_path_factory.mktemp("lora")
    path = config_file(folder, write_backbone(folder / "model", tie_word_embeddings=True))
    words = ["train", path, UNMERGED, "--train.learning-rate=0.05"]
    assert main([*words, f"--run.dir={folder}/whole"]) == 0
    return folder, words


def test_resumed_runs_merged_exports_and_peft_agree(unmerged, tmp_path):
    folder, words = unmerged
    assert main([*words, f"--run.dir={tmp_path}/cut", "--train.steps=2"]) == 0
    assert main([*words, f"--run.dir={tmp_path}/cut"]) == 0
    exports = folder / "whole/export", tmp_path / "cut/export"
    whole, cut = (load_file(export / "adapter_model.safetensors") for export in exports)
    assert all(torch.equal(cut[name], tensor) for name, tensor in whole.items())
    names = set(load_file(folder / "whole/checkpoints/step-000004/model.safetensors"))
    assert all("lora_" in name or name.endswith(".rows") for name in names)
    assert len(names) == len(whole) == 2 * 2 * 7 + 1

    ours = TextDiffusion.from_pretrained(exports[0])
    assert main([*words, "--train.lora.merge=true", f"--run.dir={tmp_path}/merged"]) == 0
    merged = TextDiffusion.from_pretrained(tmp_path / "merged")
    mask = ours.model.config.mask_token_id
    ids = torch.tensor([[*ours.tokenizer.encode("the cat sat 7 times."), mask]])
    assert float((logits(ours.model, ids) - logits(merged.model, ids)).abs().max()) < 1e-5

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    known = len(base.get_input_embeddings().weight)
    base.resize_token_embeddings(len(ours.tokenizer), mean_resizing=False)
    with torch.no_grad():
        before = base(ids).logits[..., :known]
        after = PeftModel.from_pretrained(base, str(exports[0])).eval()(ids).logits[..., :known]
        found = ours.model(ids, layout=Layout("causal")).logits[..., :known]
    torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-5)
    assert float((before - after)[:, :-1].abs().max()) > 0.01


def test_adapters_without_their_base_are_refused(unmerged, tmp_path, capsys):
    folder, words = unmerged
    export = shutil.copytree(folder / "whole/export", tmp_path / "export")
    other = write_backbone(tmp_path / "other", tie_word_embeddings=True, initializer_range=0.2)
    place = export / "base.json"
    place.write_text(place.read_text().replace(str(folder / "model"), str(other)))
    with refused(CheckpointError, "other_base", str(other)):
        TextDiffusion.from_pretrained(export)
    flags = [f"--{key}.path={folder}/model" for key in ("model", "tokenizer")]
    flags.append("--tokenizer.kind=pretrained")
    flags += [f"--train.init-from=hf:{other}", "--train.steps=5"]
    assert main([*words, *flags, f"--run.dir={folder}/whole"]) != 0
    assert "holds other weights" in capsys.readouterr().err
    other.rename(tmp_path / "away")
    with refused(CheckpointError, "missing_base", str(other), "base.json"):
        TextDiffusion.from_pretrained(export)
    export = shutil.copytree(folder / "whole/export", tmp_path / "torn")
    (export / "adapter_model.safetensors").write_bytes(b"torn")
    with refused(CheckpointError, "damaged_adapters", str(export)):
        TextDiffusion.from_pretrained(export)


def test_an_export_of_ours_is_a_base_in_another_block_size(runs, single):
    base = runs / "single" / "export"
    flags = [f"--train.init-from={base}", "--diffusion.block-size=8", "--train.steps=3"]
    flags += [f"--tokenizer={{kind: pretrained, path: {base}}}", "--evaluate.every=3"]
    flags += ["--train.lora={targets: [attn_qkv, mlp.0, mlp.2], dropout: 0.1}"]
    runs.train("lora-merged", *flags)
    runs.train("lora-beside", *flags, "--train.lora.merge=false")
    merged, beside = (
        TextDiffusion.from_pretrained(runs / name) for name in ("lora-merged", "lora-beside")
    )
    assert beside.family.block_size == 8
    weights = beside.model.state_dict()
    before = load_file(base / "model.safetensors")
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("attn_qkv", "mlp.0", "mlp.2")
    }
    for name, tensor in merged.model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)


# --- refusals ------------------------------------------------------------------------------------


def test_targets_are_ends_of_names(tmp_path):
    folder = write_backbone(tmp_path, tie_word_embeddings=True)
    model, _ = adapted(folder, targets=["q_proj", "mlp.down_proj"])
    names = {name.split(".lora_")[0] for name in trained_parameters(model) if "lora_" in name}
    ends = ("self_attn.q_proj", "mlp.down_proj")
    assert names == {f"network.model.layers.{i}.{end}" for i in (0, 1) for end in ends}
    with refused(ConfigError, "unknown_target", "'query'", "q_proj", "down_proj", "lm_head"):
        adapted(folder, targets=["q_proj", "query"])
    with refused(ConfigError, "tied_target", "lm_head"):
        adapted(folder, targets=["lm_head"])


def test_settings_that_adapters_cannot_have(tmp_path, monkeypatch):
    folder = write_backbone(tmp_path)
    for words, train in {
        "train.init_from": {"init_from": None},
        "adamw": {"optimizer": "muon"},
        "merge: false": {"lora": {"base_bits": 4}},
    }.items():
        with refused(ConfigError, None, words):
            raw = {"init_from": f"hf:{folder}", "lora": LORA} | train
            validate({"data": {"sequence_length": 16}, "train": raw})
    with refused(ConfigError, "needs_gpu", "cpu"):
        adapted(folder, base_bits=4, merge=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(ConfigError, "no_peft", "pip install textdiff[lora]"):
        adapted(folder)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_adapters_as_one_does_sharded_or_not(runs, tmp_path):
    folder = write_backbone(tmp_path, tie_word_embeddings=True)
    flags = [
        f'--model={{"kind": "transformers", "path": "{folder}"}}',
        f'--tokenizer={{"kind": "pretrained", "path": "{folder}"}}',
        f"--train.init-from=hf:{folder}",
        "--train.lora.rank=4",
        "--diffusion.block-size=4",
        "--train.steps=8",
        "--evaluate.every=8",
    ]
    expected = runs.train("lora-one", *flags)
    copied = runs.launch("lora-copied", "cpu", *flags, "--train.micro-batch-size=4")
    sharded = runs.launch_sharded("lora-sharded", "fsdp2", *flags, "--train.micro-batch-size=4")
    assert_same_curve(copied, expected)
    assert_same_curve(sharded, expected)
    one = load_file(runs / "lora-one" / "export" / "model.safetensors")
    for name in ("lora-copied", "lora-sharded"):
        two = load_file(runs / name / "export" / "model.safetensors")
        assert list(two) == list(one)
        for key, tensor in one.items():
            torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-6, msg=key)
