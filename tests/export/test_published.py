"""Published checkpoints: containers, families, refusals, and their life in every verb."""

import json
import shutil

import pytest
import torch
import yaml
from refusals import refused
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    LENGTH,
    ROWS,
    SEDD,
    hub,
    lightning,
    pickled,
    prefixed,
    sedd_run,
    sharded,
    tokenizer,
    weights,
)

from textdiff import TextDiffusion, load_denoiser
from textdiff.cli import main
from textdiff.diffusion.family import build_family
from textdiff.diffusion.noise import Noise
from textdiff.errors import CheckpointError, ConfigError
from textdiff.export.conversion import write_converted
from textdiff.export.convert import CHECKPOINT_FAMILIES
from textdiff.loss import Batch, PositionTerms
from textdiff.models import CAUSAL


@pytest.mark.parametrize("container", [hub, sharded, pickled, lightning, sedd_run])
def test_every_container_holds_the_same_network(container, tmp_path):
    state = weights()
    denoiser, _ = load_denoiser(container(tmp_path / "x", state))
    assert {k: v.tolist() for k, v in denoiser.state_dict().items()} == {
        k: v.tolist() for k, v in state.items()
    }


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.backbone.", "_orig_mod.backbone."])
def test_prefixes_are_left_out(prefix, tmp_path):
    folder = hub(tmp_path)
    save_file(prefixed(weights(), prefix), folder / "model.safetensors")
    assert set(load_denoiser(folder)[0].state_dict()) == set(weights())


NO_TIME = {"adaln": False}
RECOGNISED = {
    "mdlm": ({}, {}, ("absorbing", "mdlm", None)),
    "bd3lm": (
        {"model_type": "bd3lm", "cross_attn": True, "block_size": 4},
        {},
        ("absorbing", "mdlm", 4),
    ),
    "pretraining": (
        {"model_type": "bd3lm", "cross_attn": True, "block_size": LENGTH},
        {},
        ("absorbing", "mdlm", None),
    ),
    "sedd in the container of BD3-LM": (
        {"model_type": "bd3lm", "cross_attn": False, "time_conditioning": True},
        {},
        ("absorbing", "sedd", None),
    ),
    "ar": ({"model_type": "bd3lm", "causal": True}, NO_TIME, ("absorbing", "ar", 1)),
    "udlm": ({"model_type": "udlm", "time_conditioning": True}, {}, ("uniform", "udlm", None)),
    "duo": ({"model_type": "DUO"}, {}, ("uniform", "udlm", None)),
    "gidd": ({"model_type": "dit", "p_uniform": 0.1}, {}, ("hybrid", "gidd", None)),
    "uniform sedd": (
        {"graph": {"type": "uniform"}, "model": {"scale_by_sigma": False}},
        {},
        ("uniform", "sedd", None),
    ),
    "d3pm": (
        {"model_type": None, "parameterization": "d3pm", "diffusion": "absorbing_state"},
        {},
        ("absorbing", "d3pm", None),
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_families_are_recognised_by_config_and_names(name, tmp_path):
    settings, network, expected = RECOGNISED[name]
    denoiser, family = load_denoiser(hub(tmp_path, weights(**network), **settings))
    assert (family.process.name, family.objective.kind, family.block_size) == expected
    reads = denoiser.config.time_conditioning
    assert reads == (name not in ("mdlm", "bd3lm", "pretraining", "ar", "d3pm"))
    assert family.time_input == ("time" if name == "gidd" else "sigma")
    if name == "uniform sedd":
        assert family.objective.scaled is False


def test_a_vocabulary_without_a_mask_gets_a_row_that_is_never_predicted(tmp_path):
    denoiser, family = load_denoiser(hub(tmp_path, model_type="udlm", time_conditioning=True))
    ids = torch.arange(LENGTH)[None]
    logits = denoiser(ids, sigma=torch.ones(1)).logits
    assert logits.shape[-1] == ROWS + 1
    assert family.process.mask_token_id == ROWS
    assert family.process.vocabulary.count == ROWS
    alpha = torch.full((LENGTH,), 0.5, dtype=torch.float64)
    log_x0 = family.objective.predict(logits[0], ids[0], alpha).log_x0
    assert (log_x0[:, ROWS] == -torch.inf).all()
    assert torch.equal(log_x0[:, :ROWS], logits[0, :, :ROWS].log_softmax(-1))


def test_gidd_reads_time_and_others_the_noise_level(tmp_path):
    _, family = load_denoiser(hub(tmp_path, model_type="dit", p_uniform=0.1))
    t = torch.tensor([0.1, 0.7], dtype=torch.float64)
    alpha = family.schedule.alpha(t)
    torch.testing.assert_close(family.network_time(alpha), t.float())
    spec = {"process": "absorbing", "schedule": {"kind": "loglinear"}, "block_size": None}
    spec["objective"] = {"kind": "mdlm"}
    assert (
        build_family(spec, family.process.vocabulary)
        .network_time(alpha)
        .equal(-torch.log(alpha).float())
    )
    with refused(ConfigError, "unknown_time_input", "sigma, step, time"):
        build_family(spec | {"time_input": "hours"}, family.process.vocabulary)
    with refused(ConfigError, "no_steps", "timesteps"):
        build_family(spec | {"time_input": "step"}, family.process.vocabulary)


def test_sedd_as_mdlm_is_never_above_sedd(tmp_path):
    """Scores that add up to Z times what they should have an excess of Z - 1 - ln Z."""
    folder = hub(tmp_path, **(SEDD | {"model_type": None}))
    x0 = torch.randint(0, ROWS - 1, (2, LENGTH))
    xt = torch.where(torch.rand(2, LENGTH) < 0.5, ROWS - 1, x0)
    nats = {}
    for name in ("sedd", "sedd-as-mdlm"):
        denoiser, family = load_denoiser(folder, name)
        logits = denoiser(xt, sigma=torch.tensor([0.5, 2.0])).logits
        alpha = torch.exp(-torch.tensor([0.5, 2.0]).double())[:, None].expand(xt.shape)
        weight = torch.ones_like(alpha)
        noise = Noise(alpha.flatten(), weight.flatten(), weight.flatten(), weight.flatten())
        prediction = family.objective.predict(logits.flatten(0, 1), xt.flatten(), noise.alpha)
        nats[name] = family.objective.nelbo_terms(prediction, x0.flatten(), xt.flatten(), noise)
    z = logits[..., :-1].flatten(0, 1).double().exp().sum(-1) / (ROWS - 1)
    excess = nats["sedd"] - nats["sedd-as-mdlm"]
    torch.testing.assert_close(excess, z - 1.0 - z.log(), atol=1e-5, rtol=1e-5)
    assert (excess > -1e-6).all()


def test_a_text_whose_first_token_is_not_scored_is_read_without_a_start(tmp_path):
    denoiser, family = load_denoiser(hub(tmp_path, weights(**NO_TIME), causal=True))
    family = build_family(
        denoiser.config.diffusion | {"objective": {"kind": "ar", "start": 3}},
        family.process.vocabulary,
    )
    x0 = torch.randint(0, ROWS - 1, (2, LENGTH))
    one = torch.ones(x0.numel(), dtype=torch.float64)
    positions = torch.arange(x0.numel())
    positions = positions[positions != 0]  # row 0 without its first token, row 1 whole
    noise = Noise(0.0 * one, one, 0.5 * one, one).map(lambda value: value[positions])
    batch = Batch(x0, x0, positions, noise, torch.zeros(2, LENGTH), None, 1)
    nats = torch.zeros(x0.numel(), dtype=torch.float64)
    nats[positions] = PositionTerms(denoiser, family, batch).all()
    nats = nats.view(x0.shape)

    def reference(row):
        logits = denoiser(row[None], layout=CAUSAL).logits[0, :-1, : ROWS - 1]
        return -logits.log_softmax(-1).gather(-1, row[1:, None]).squeeze(-1).double()

    torch.testing.assert_close(nats[0, 1:], reference(x0[0]), atol=1e-5, rtol=0.0)
    begun = torch.cat([torch.tensor([3]), x0[1]])
    torch.testing.assert_close(nats[1], reference(begun), atol=1e-5, rtol=0.0)


# --- refusals ------------------------------------------------------------------------------------


def test_files_that_need_unpickling_are_refused_with_a_way_out(tmp_path):
    file = lightning(tmp_path, weights(), hyper_parameters=yaml.YAMLError)
    with refused(CheckpointError, "needs_unpickling", "save_file(state_dict") as error:
        load_denoiser(file)
    assert "can run code" in str(error.value)


def changed(folder, **changes):
    """Change tensors in a folder's file; None removes one."""
    state = load_file(folder / "model.safetensors") | changes
    kept = {name: value for name, value in state.items() if value is not None}
    save_file(kept, folder / "model.safetensors")


HEAD = "backbone.output_layer.linear.bias"
WRONG = {
    "missing": ({HEAD: None}, "weights_do_not_fit", "missing: output_layer.linear.bias"),
    "left over": ({"backbone.extra": torch.ones(1)}, "weights_do_not_fit", "left over: extra"),
    "shape": ({HEAD: torch.ones(7)}, "weights_do_not_fit", "(7,) instead of (41,)"),
    "classes": ({"backbone.cond_map.w": torch.ones(1)}, "not_supported", "cond_map.w"),
    "teacher": ({"teacher.backbone.w": torch.ones(1)}, "not_supported", "student"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_listed(name, tmp_path):
    changes, code, said = WRONG[name]
    folder = hub(tmp_path)
    changed(folder, **changes)
    with refused(CheckpointError, code, said):
        load_denoiser(folder)


def test_unknown_and_wrong_families_list_what_is_known(tmp_path):
    folder = hub(tmp_path)
    with refused(ConfigError, "unknown_checkpoint_family", "sedd-as-mdlm"):
        load_denoiser(folder, "mldm")
    with refused(CheckpointError, "missing_setting", "'p_uniform'"):
        load_denoiser(folder, "gidd")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with refused(CheckpointError, "not_an_export", ", ".join(CHECKPOINT_FAMILIES)):
        load_denoiser(folder)
    save_file({"wte.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    with refused(CheckpointError, "wrong_family", "vocab_embed.embedding"):
        load_denoiser(folder, "mdlm")


def test_damaged_files_are_refused(tmp_path):
    folder = hub(tmp_path / "a")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with refused(CheckpointError, "damaged", "model.safetensors"):
        load_denoiser(folder)
    index = sharded(tmp_path / "b", weights())
    (index / "b.safetensors").unlink()
    with refused(CheckpointError, "no_weights", "b.safetensors is missing"):
        load_denoiser(index)
    short = dict(list(weights().items())[1:])
    with refused(CheckpointError, "unnamed_average", "EMA"):
        load_denoiser(lightning(tmp_path / "c", short))
    shutil.copy(tmp_path / "c" / "last.ckpt", tmp_path / "c" / "one.ckpt")
    (tmp_path / "c" / "last.ckpt").rename(tmp_path / "c" / "two.ckpt")
    with refused(CheckpointError, "several_checkpoints", "one.ckpt, two.ckpt"):
        load_denoiser(tmp_path / "c")


def test_a_branch_of_the_hub_is_fetched(tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision=None, allow_patterns=None):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub(tmp_path)
    load_denoiser("jdeschena/sdtt@baselines_kld_step_10000")
    assert asked == [("jdeschena/sdtt", "baselines_kld_step_10000")]


def test_tokenizers_are_needed_and_must_fit(tmp_path):
    folder = hub(tmp_path / "model")
    with refused(CheckpointError, "no_tokenizer", "--tokenizer"):
        TextDiffusion.from_pretrained(folder)
    other = tokenizer()
    other.add_tokens(["one", "more"])
    other.save_pretrained(tmp_path / "large")
    with refused(CheckpointError, "tokenizer_does_not_fit", "another model's"):
        TextDiffusion.from_pretrained(folder, tokenizer=str(tmp_path / "large"), device="cpu")


# --- in every verb -------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    folder = hub(tmp_path / "published")
    tokenizer().save_pretrained(folder)
    return folder


def baseline(folder):
    """A left-to-right one with a tokenizer."""
    hub(folder, weights(**NO_TIME), causal=True)
    tokenizer().save_pretrained(folder)
    return folder


def test_a_tokenizer_gets_the_mask_of_the_checkpoint_and_a_padding_row(published):
    held = TextDiffusion.from_pretrained(published, device="cpu")
    config, vocabulary = held.model.config, held.family.process.vocabulary
    assert held.tokenizer.mask_token_id == config.mask_token_id == ROWS - 1
    assert held.tokenizer.pad_token_id == ROWS
    assert vocabulary.ids.tolist() == list(range(ROWS - 1))
    plain, _ = load_denoiser(published)
    ids = torch.arange(LENGTH)[None]
    assert torch.equal(held.model(ids).logits[..., :ROWS], plain(ids).logits)


def test_a_converted_checkpoint_is_the_published_one(published, tmp_path):
    target = tmp_path / "export"
    write_converted(str(published), target)
    before, after = (TextDiffusion.from_pretrained(p, device="cpu") for p in (published, target))
    assert before.model.config.to_diff_dict()["diffusion"] == after.model.config.diffusion
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    texts = [held.generate("ab", seed=4, max_new_tokens=8).texts for held in (before, after)]
    assert texts[0] == texts[1]
    origin = json.loads((target / "training.json").read_text())["converted_from"]
    assert origin["family"] == "mdlm"
    assert "license: apache-2.0" in (target / "README.md").read_text()
    with refused(ConfigError, "target_exists", "not overwritten"):
        write_converted(str(published), target)
    with refused(ConfigError, "is_export", "nothing to convert"):
        write_converted(str(target), tmp_path / "again")


def test_every_verb_takes_a_published_checkpoint(published, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and so on.\n" * 8)
    model = str(published)
    assert main(["perplexity", model, str(text), "--protocol", "mdlm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1.0
    assert main(["generate", model, "the", "--max-new-tokens", "6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["convert", model, str(tmp_path / "export")]) == 0
    assert "family mdlm" in capsys.readouterr().out
    assert main(["compare", model, str(tmp_path / "export"), str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"]["mean"] == pytest.approx(0.0, abs=1e-5)
    write_converted(str(baseline(tmp_path / "ar")), tmp_path / "judge")
    words = ["--judge", str(tmp_path / "judge"), "--reference", str(text), "--num-samples", "8"]
    assert main(["evaluate", model, *words, "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"]["texts"] == 8
    config = {
        "run": {"dir": str(tmp_path / "run")},
        "data": {"sources": [{"source": str(text)}], "sequence_length": 16, "validation": 0.3},
        "tokenizer": {"kind": "pretrained", "path": model},
        "model": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "adaln": True},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2, "init_from": model},
        "sample": {"num_samples": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
