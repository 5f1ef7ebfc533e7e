"""A schedule with parameters trains, resumes, is averaged and exported like the network."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from textdiff.cli import main
from textdiff.config.reading import validate
from textdiff.diffusion import DiffusionConfig
from textdiff.errors import ConfigError
from textdiff.pipeline import TextDiffusion
from textdiff.train.run_state import EMA

CONFIG = """
data: {{sources: [{{source: {corpus}}}], sequence_length: 32, cache_dir: {folder}/cache}}
tokenizer: {{kind: char}}
model: {{hidden_size: 32, num_layers: 2, num_heads: 2, adaln: true, time_conditioning: true}}
diffusion: {{schedule: {{kind: learned, exponent: 1.3}}, noise: {{draw: time}}}}
train: {{steps: 8, global_batch_size: 8, micro_batch_size: 8, warmup_steps: 2, log_every: 1,
         lr_schedule: constant, learning_rate: 0.001, checkpoint_every: 4, mixed_precision: fp32}}
evaluate: {{every: 8}}
sample: {{num_samples: 1, steps: 8, max_new_tokens: 16}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"Line {i} of {i * i} is here.\n" for i in range(400)))
    (folder / "c.yaml").write_text(CONFIG.format(corpus=corpus, folder=folder))
    return folder


def train(folder: Path, name: str, *flags: str) -> list[dict]:
    assert main(["train", str(folder / "c.yaml"), f"--run.dir={folder / name}", *flags]) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def single(folder) -> list[dict]:
    return train(folder, "single")


VALUES = ("step", "loss", "grad_norm", "learning_rate", "tokens", "bound_nats", "bound_stderr")


def values(lines: list[dict]) -> list[dict]:
    return [{key: line[key] for key in VALUES if key in line} for line in lines]


def test_a_resumed_run_is_the_uninterrupted_one(folder, single):
    train(folder, "resumed", "--train.steps=4", "--evaluate.every=8")
    found = train(folder, "resumed")
    before = [line for line in values(found) if "bound_nats" not in line or line["step"] == 8]
    assert before == values(single)
    for name in ("model", "ema"):
        one, other = (
            load_file(folder / run / "checkpoints" / "step-000008" / f"{name}.safetensors")
            for run in ("single", "resumed")
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("block", ["null", "8"])
def test_accumulation_and_workers_change_nothing(folder, single, block):
    flags = (f"--diffusion.block-size={block}",)
    whole = single if block == "null" else train(folder, f"whole-{block}", *flags)
    parts = train(folder, f"parts-{block}", *flags, "--train.micro-batch-size=4")
    workers = train(folder, f"workers-{block}", *flags, "--data.num-workers=1")
    assert values(workers) == values(whole)
    for one, other in zip(parts, whole, strict=True):
        for key in {"loss", "grad_norm", "bound_nats"} & other.keys():
            assert one[key] == pytest.approx(other[key], rel=2e-5), (other["step"], key)


def test_the_export_holds_the_averaged_exponents(folder, single):
    checkpoint = folder / "single" / "checkpoints" / "step-000008"
    raw, average = (
        load_file(checkpoint / f"{name}.safetensors")["exponents.raw"] for name in ("model", "ema")
    )
    assert not torch.equal(raw, average)
    held = TextDiffusion.from_pretrained(folder / "single" / "export", device="cpu")
    assert torch.equal(held.model.exponents.raw, average)
    paces = held.family.process.token_exponents
    assert torch.equal(paces, torch.nn.functional.softplus(average.double()))
    assert (paces - 1.3).abs().max() > 1e-3
    assert torch.equal(held.family.on_cpu.process.token_exponents, paces)
    assert held.score(["Line 7 of 49 is here."], seed=1)[0].mean < 10.0
    assert len(held.generate("Line", max_new_tokens=8, steps=4).sequences[0]) == 12


def test_the_average_and_its_swap_cover_the_exponents(folder, single):
    held = TextDiffusion.from_pretrained(folder / "single" / "export", device="cpu")
    average = EMA(held.model, 0.9)
    with torch.no_grad():
        held.model.exponents.raw += 1.0
    moved = held.family.process.token_exponents.detach()
    average.update(held.model)
    with average.applied(held.model):
        inside = held.family.on_cpu.process.token_exponents
    assert (inside < moved).all()
    assert torch.equal(held.family.process.token_exponents, moved)


@pytest.mark.parametrize(
    ("diffusion", "reason"),
    [
        ({"noise": {"draw": "count"}}, "compares two masks of one time"),
        ({"noise": {"draw": "time", "range": [0.1, 0.9]}}, "over all times"),
        ({"objective": {"kind": "sedd"}}, "objective: {kind: mdlm, loss_weight: elbo}"),
        ({"objective": {"kind": "mdlm", "loss_weight": "ce"}}, "trained on the bound"),
        ({"process": "uniform", "objective": {"kind": "udlm"}}, "not go with process uniform"),
        ({"timesteps": 100}, "continuous time"),
    ],
)
def test_what_a_learned_schedule_does_not_go_with_is_refused(diffusion, reason):
    base = {"schedule": {"kind": "learned"}, "noise": {"draw": "time"}}
    DiffusionConfig.model_validate(base)
    with pytest.raises(ConfigError) as caught:
        validate({"diffusion": base | diffusion})
    assert reason in str(caught.value)


@pytest.mark.slow
def test_shakespeare_moves_the_exponents(folder, data_folder):
    """A slice of 60 kB: the bound is finite and far below uniform, w has left its start."""
    text = (data_folder / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")[:60_000]
    corpus = folder / "slice.txt"
    corpus.write_text(text, encoding="utf-8")
    flags = [f"--data.sources.0.source={corpus}", "--diffusion.schedule.exponent=1.0"]
    flags += ["--train.steps=1000", "--evaluate.every=1000", "--train.log-every=100"]
    flags += ["--train.learning-rate=0.003"]
    *_, last = train(folder, "slice", *flags)
    held = TextDiffusion.from_pretrained(folder / "slice" / "export", device="cpu")
    assert 1.0 < last["bound_nats"] < 3.3
    clean = held.family.process.vocabulary.ids
    paces = held.family.process.token_exponents.detach()[clean]
    assert float((paces - 1.0).abs().max()) > 0.05
    assert (paces > 0.0).all()
