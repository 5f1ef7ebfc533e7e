"""Every shipped config trains, scores and samples once its sizes are overridden."""

import json
import math
from pathlib import Path

import pytest
from test_adapt_configs import KINDS as ADAPTATIONS

from textdiff.cli import main

SMALL = [
    "--data.sequence-length=32",
    "--data.num-proc=1",
    "--data.num-workers=0",
    "--data.validation=0.1",
    "--model.hidden-size=32",
    "--model.num-layers=2",
    "--model.num-heads=2",
    "--train.steps=2",
    "--train.global-batch-size=4",
    "--train.micro-batch-size=2",
    "--sample.steps=2",
    "--sample.max-new-tokens=8",
]


def overrides(name: str, folder: Path) -> list[str]:
    corpus = folder / "corpus.txt"
    corpus.write_text("".join(f"A sentence about the number {i}.\n" for i in range(300)))
    flags = [f"--run.dir={folder / name}", f"--data.cache-dir={folder / 'cache'}"]
    if name != "quickstart":
        flags.append(f"--data.sources.0.source={corpus}")
    if name.endswith("owt-small"):
        flags += ["--tokenizer", '{"kind": "byte"}', "--train.compile=false"]
        flags.append("--train.init-from=null")
    if name == "quickstart" or name.endswith("text-files-bpe"):
        flags.append("--tokenizer.vocab-size=300")
    return [*flags, *SMALL]


def test_every_config_is_covered(root):
    assert {path.stem for path in (root / "configs").glob("*.yaml")} == {
        *ADAPTATIONS,
        "instruct",
        "quickstart",
        "shakespeare-char",
        "text-files-bpe",
        "mdlm-owt-small",
        "sedd-owt-small",
        "bd3lm-char",
        "bd3lm-text-files-bpe",
        "bd3lm-owt-small",
        "sedd-block-owt-small",
    }


def test_two_steps_of_instruct(root, tmp_path, capsys):
    rows = [{"question": f"After {i}?", "answer": str(i + 1)} for i in range(200)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [f"--run.dir={tmp_path / 'run'}", f"--data.cache-dir={tmp_path / 'cache'}", *SMALL]
    flags += [f"--data.sources.0.source={questions}", "--train.init-from=null"]
    flags += ["--tokenizer", '{"kind": "byte"}', "--data.sequence-length=64"]
    assert main(["train", str(root / "configs" / "instruct.yaml"), *flags]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert last["bound_nats"] > 0


@pytest.mark.parametrize(
    "name",
    [
        "shakespeare-char",
        "text-files-bpe",
        "mdlm-owt-small",
        "sedd-owt-small",
        "bd3lm-char",
        "bd3lm-text-files-bpe",
        "bd3lm-owt-small",
        "sedd-block-owt-small",
    ],
)
def test_two_steps(root, tmp_path, name, capsys):
    path = str(root / "configs" / f"{name}.yaml")
    assert main(["train", path, *overrides(name, tmp_path)]) == 0
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == 2
    # The network starts uniform and two steps change little: the bound is near log of the ids.
    config = json.loads((tmp_path / name / "export" / "config.json").read_text())
    assert last["bound_nats"] < 1.3 * math.log(config["vocab_size"])
    assert config["adaln"] == name.endswith("owt-small")
    in_blocks = name.startswith("bd3lm") or "block" in name
    assert (config["diffusion"]["block_size"] is not None) == in_blocks
    assert ("noise_low" in last) == in_blocks


def test_gpt2_tokenizer_makes_the_published_vocabulary(root, tmp_path, data_folder, capsys):
    path = str(root / "configs" / "mdlm-owt-small.yaml")
    words = overrides("mdlm-owt-small", tmp_path)
    at = words.index("--tokenizer")
    gpt2 = json.dumps({"kind": "pretrained", "path": str(data_folder / "gpt2-tokenizer")})
    words[at + 1] = gpt2
    assert main(["train", path, *words]) == 0
    config = json.loads((tmp_path / "mdlm-owt-small" / "export" / "config.json").read_text())
    assert config["mask_token_id"] == 50257
    assert config["pad_token_id"] != config["eos_token_id"]


def test_init_from_continues_another_model(root, tmp_path, capsys):
    path = str(root / "configs" / "shakespeare-char.yaml")
    words = overrides("shakespeare-char", tmp_path)
    assert main(["train", path, *words, "--train.steps=30"]) == 0
    export = tmp_path / "shakespeare-char" / "export"
    more = [
        f"--run.dir={tmp_path / 'more'}",
        f"--train.init-from={export}",
        "--train.warmup-steps=2",
    ]
    assert main(["train", path, *words, *more]) == 0
    bounds = [
        json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1])["bound_nats"]
        for run in ("shakespeare-char", "more")
    ]
    assert bounds[1] < bounds[0] + 0.2
    capsys.readouterr()
    wrong = ["--model.num-layers=3", f"--run.dir={tmp_path / 'wrong'}"]
    assert main(["train", path, *words, *more, *wrong]) == 2
    assert "does not fit the model section" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(root, tmp_path, capsys):
    path = str(root / "configs" / "shakespeare-char.yaml")
    bounds = []
    for flag in ("false", "true"):
        words = [*overrides("shakespeare-char", tmp_path), "--train.mixed-precision=fp32"]
        words += [f"--run.dir={tmp_path / flag}", f"--train.compile={flag}", "--train.steps=5"]
        assert main(["train", path, *words]) == 0
        lines = (tmp_path / flag / "metrics.jsonl").read_text().splitlines()
        bounds.append(json.loads(lines[-1])["bound_nats"])
    assert bounds[0] == pytest.approx(bounds[1], abs=1e-3)
