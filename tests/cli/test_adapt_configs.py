"""The shipped configs of adaptation train tiny random networks of their architectures."""

import json

import pytest
from tiny_backbones import write_backbone

from textdiff.cli import main
from textdiff.config.reading import load

KINDS = {
    "adapt-qwen3-0.6b": "qwen3",
    "adapt-smollm2-135m": "llama",
    "adapt-modernbert": "modernbert",
}


@pytest.mark.parametrize("name", KINDS)
def test_two_steps(root, tmp_path, name, capsys):
    path, corpus = root / "configs" / f"{name}.yaml", tmp_path / "corpus.txt"
    corpus.write_text("".join(f"the cat sat on number {i}.\n" for i in range(300)))
    model = write_backbone(tmp_path / "model", KINDS[name], tie_word_embeddings=True)
    shipped = load(path)
    words = [
        f"--run.dir={tmp_path / 'run'}",
        '--data.sources=[{"source": "' + str(corpus) + '"}]',
        f"--data.cache-dir={tmp_path / 'cache'}",
        "--data.sequence-length=32",
        "--data.num-proc=1",
        "--data.num-workers=0",
        "--data.validation=0.1",
        f"--model.path={model}",
        f"--tokenizer.path={model}",
        f"--train.init-from=hf:{model}",
        "--train.steps=2",
        "--train.global-batch-size=4",
        "--train.micro-batch-size=2",
        "--train.mixed-precision=fp32",
        "--sample.steps=2",
        "--sample.max-new-tokens=8",
    ]
    assert main(["train", str(path), *words]) == 0
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["model_type"] == KINDS[name]
    assert config["diffusion"]["block_size"] == shipped.diffusion.block_size
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    assert last["bound_nats"] < 10.0
    assert shipped.train.init_from == f"hf:{shipped.model.path}"
    assert shipped.tokenizer.path == shipped.model.path
